"""Benchmarks and examples as users start them: in a folder of their own, with settings that end with them."""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from poolformer_kernels.cli.extras import NEEDS
from poolformer_kernels.cli.main import main
from support.peers import require


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
        for package in NEEDS[f"bench {name}"][1]:
            require(package)
        file = self.folder / f"{name}.csv"
        device = [] if name in ("host", "loop") else ["--device", "cpu"]
        quick = ["--threads", "1", "--rounds", "2", "--csv", str(file)]
        self.capture.readouterr()
        found = main(["bench", name, *device, *quick, *arguments])
        ran = Ran(*self.capture.readouterr(), file)
        assert found == code, ran.out + ran.err
        return ran

    def refusal(self, name: str, *arguments: str) -> str:
        """The one line of a benchmark that cannot meet its request."""
        ran = self.bench(name, *arguments, code=2)
        (line,) = ran.err.splitlines()
        assert ran.out == ""
        assert line.startswith("poolformer-kernels: error: ")
        return line.removeprefix("poolformer-kernels: error: ")

    def python(self, *command: str, code: int = 0, **environment: str) -> str:
        """What a process prints. It starts where the source tree is not found by chance."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout
