"""The list of `make mutants`: each mistake can be made in the source as it is now."""

from collections import Counter

import pytest
from mutants.mutant import ROOT, Mutant, behind_a_number, replaced
from mutants.run import MUTANTS, SELECTIONS

IMPLEMENTATIONS = {"cpp": "csrc/cpu/", "triton": "poolformer_kernels/backends/triton/", "cuda": "csrc/cuda/"}


def test_there_are_enough_of_each_implementation() -> None:
    assert len(MUTANTS) >= 30
    least = {"cpp": 12, "triton": 9, "cuda": 9}
    for name, folder in IMPLEMENTATIONS.items():
        assert sum(mutant.file.startswith(folder) for mutant in MUTANTS) >= least[name], name


def test_each_has_a_name_of_its_own_and_tests() -> None:
    names = Counter((mutant.target, mutant.operator, mutant.name) for mutant in MUTANTS)
    assert max(names.values()) == 1
    assert {(mutant.target, mutant.operator) for mutant in MUTANTS} == set(SELECTIONS)
    for selection in SELECTIONS.values():
        for file in selection.files:
            assert (ROOT / "tests" / file).is_file()


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_the_original_text_occurs_exactly_once(file) -> None:
    """Also among the other mutants of a file in C++, which one build holds: none is inside another one."""
    text = (ROOT / file).read_text()
    own = [(number, mutant) for number, mutant in enumerate(MUTANTS, 1) if mutant.file == file]
    for _, mutant in own:
        assert replaced(text, mutant) != text
    if not file.endswith(".py"):
        assert behind_a_number(text, own).count("pk_mutant == ") == len(own)


def test_a_text_that_occurs_twice_is_refused() -> None:
    mutant = Mutant("a wrong sign", "cpp", "mlp", "file.h", "a + b", "a - b")
    with pytest.raises(AssertionError, match="occurs 2 times"):
        replaced("a + b, a + b", mutant)
    assert behind_a_number("return a + b;", [(7, mutant)]) == "return (pk_mutant == 7 ? (a - b) : (a + b));"
