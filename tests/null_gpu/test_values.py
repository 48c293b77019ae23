"""Tests that are not marked as the host's are not run here: they would look at what no kernel wrote."""

import pytest


def test_that_looks_at_values() -> None:
    pytest.fail("ran on the null GPU without the mark `host`")
