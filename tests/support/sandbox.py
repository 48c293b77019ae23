"""Benchmarks and examples as users start them: in a folder of their own, with settings that end with them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from poolformer_kernels.cli.extras import NEEDS
from poolformer_kernels.cli.main import main
from support.commands import refused
from support.peers import require
from support.processes import python


@dataclass
class Ran:
    """What a benchmark printed, and the file for its rows."""

    out: str
    err: str
    file: Path

    @property
    def words(self) -> str:
        """What it printed, wherever the terminal broke the lines."""
        return " ".join(self.out.split())

    @property
    def rows(self) -> list[dict[str, str]]:
        with self.file.open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def by_provider(self) -> dict[str, dict[str, str]]:
        """Of a provider's rows the last."""
        return {row["provider"]: row for row in self.rows}

    @property
    def missing(self) -> list[str]:
        """The lines of the file that says why providers have no rows."""
        return self.file.with_suffix(".missing.txt").read_text().splitlines()


@dataclass
class Sandbox:
    """The current folder of a test: see the fixture."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    def bench(self, name: str, *arguments: str, code: int = 0) -> Ran:
        """A benchmark in this process; a skip without the packages that it needs."""
        words = self._words(name, *arguments)
        self.capture.readouterr()
        found = main(words)
        ran = Ran(*self.capture.readouterr(), self._file(name))
        assert found == code, ran.out + ran.err
        return ran

    def refusal(self, name: str, *arguments: str) -> str:
        """The one line of a benchmark that cannot meet its request."""
        return refused(self.capture, *self._words(name, *arguments))

    def python(self, *command: str, code: int = 0, **environment: str) -> str:
        """What a process prints, which starts in the folder."""
        return python(*command, cwd=self.folder, timeout=900, code=code, **environment).stdout

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.csv"

    def _words(self, name: str, *arguments: str) -> list[str]:
        """A quick benchmark."""
        for package in NEEDS[f"bench {name}"][1]:
            require(package)
        device = [] if name in ("host", "loop") else ["--device", "cpu"]
        quick = ["--threads", "1", "--rounds", "2", "--csv", str(self._file(name))]
        return ["bench", name, *device, *quick, *arguments]
