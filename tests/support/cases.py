"""The cases on which `pool_mixer` and `mlp` are tested: recorded, listed, and compared after a change.

Record while tests run, into a folder, where every process adds a file of its own::

    POOLFORMER_TEST_CASES=/tmp/before python -m pytest tests/contract tests/test_contract.py

Compare two folders: for each operator, direction and target the numbers of cases, and what is lost of the
values of each field and of their pairs with x's dtype. The exit code is 1 if something is::

    python tests/support/cases.py compare /tmp/before /tmp/after

``list FOLDER`` prints all rows; ``gaps FOLDER`` what only some of the targets are tested on. Not recorded are
calls that an operator refuses, processes that run no pytest, the reference's calls inside transforms of
torch.func and in compiled graphs, and layers of an inference chain.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "POOLFORMER_TEST_CASES"
Row = dict[str, Any]
Key = tuple[str, str, str]  # operator, direction, target
Pair = tuple[str, str, str]  # field, value, dtype of x

# ---- the plugin of pytest ----------------------------------------------------------------------------------


def pytest_collection_finish() -> None:
    """All modules are imported, and with them all kernels registered."""
    if os.environ.get(VARIABLE):
        from support import recorder

        recorder.install()


def pytest_unconfigure() -> None:
    recorder = sys.modules.get("support.recorder")
    if recorder is not None and os.environ.get(VARIABLE):
        write(map(dict, recorder.rows), Path(os.environ[VARIABLE]))


# ---- folders of rows ---------------------------------------------------------------------------------------


def write(rows: Iterable[Row], folder: Path) -> None:
    """One file for this process, none where there are no rows."""
    lines = sorted(json.dumps(row) for row in rows)
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{os.getpid()}-{os.urandom(4).hex()}.jsonl").write_text("\n".join(lines) + "\n")


def read(folder: Path) -> dict[Key, list[Row]]:
    """The distinct rows of all files, by operator, direction and target."""
    lines = {line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()}
    if not lines:
        sys.exit(f"{folder} has no cases")
    rows = defaultdict(list)
    for line in sorted(lines):
        row = json.loads(line)
        rows[row["operator"], row["direction"], row["target"]].append(row)
    return rows


# ---- what is compared --------------------------------------------------------------------------------------


def shape_classes(row: Row) -> Iterator[str]:
    batch, channels, height, width = row["x"]
    pixels = height * width
    few = {0: "no sample", 1: "one sample"}.get(batch, "samples")
    yield few if batch < 64 else "64 samples and more"
    if pixels == 0 or channels == 0:
        yield "empty images"
    elif pixels == 1:
        yield "one pixel"
    elif height == 1 or width == 1:
        yield "one row" if height == 1 else "one column"
    else:
        yield f"pixels {'below 64' if pixels < 64 else 'not of 16' if pixels % 16 else 'of 16'}"
    if batch * channels * pixels >= 2**20:
        yield "large" if batch * channels * pixels < 2**31 else "beyond int32"
    for name, size in (("channels", channels), ("hidden", row.get("hidden")), ("out", row.get("out"))):
        if size is not None:
            yield f"{name} {'1' if size == 1 else 'below 8' if size < 8 else multiple_of(size)}"
    if row.get("out", channels) != channels:
        yield "other width"


def multiple_of(size: int) -> str:
    return next((f"of {n}" for n in (64, 16, 8) if size % n == 0), "not of 8")


def coarse(row: Row) -> Iterator[tuple[str, str]]:
    """(field, value): shapes by their classes, a layout and its alignment apart, all else as it is."""
    for value in shape_classes(row):
        yield "shape", value
    for field, value in row.items():
        if field in ("operator", "direction", "target", "x", "hidden", "out"):
            continue
        if field == "pool_size":
            if value > 2 * max(row["x"][2:]) - 1:
                yield field, "beyond the image"
            value = value if value <= 9 else "above 9"
        elif field == "eps":
            value = float(value)
        for each in (value or ["none"]) if isinstance(value, list | tuple) else [value]:
            if field.startswith("layout"):
                kind, misaligned, more = each.partition(" misaligned")
                yield f"alignment{field[6:]}", "no 16 bytes" if misaligned else "16 bytes"
                each = re.sub(r"permuted \w+", "permuted", kind + more)
            yield field, str(each)


def pairs_of(rows: Iterable[Row]) -> set[Pair]:
    return {(field, value, row["dtype"]) for row in rows for field, value in coarse(row)}


def without(pairs: set[Pair], others: set[Pair]) -> list[str]:
    """What is in the first set alone: values, then pairs of values that are not alone there themselves."""
    missing = {(field, value) for field, value, _ in pairs} - {(field, value) for field, value, _ in others}
    lines = [f"{field}: {value}" for field, value in missing]
    lines += [f"{f}: {v}, with {dtype}" for f, v, dtype in pairs - others if (f, v) not in missing]
    return sorted(lines)


def compare(before: dict[Key, list[Row]], after: dict[Key, list[Row]]) -> bool:
    """Prints the difference; whether nothing is lost."""
    lost = {}
    print(f"{'operator':12}{'direction':10}{'target':22}{'before':>8}{'after':>8}{'lost':>6}{'gained':>8}")
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, []), after.get(key, [])
        pairs = pairs_of(old), pairs_of(new)
        lost[key], gained = without(*pairs), without(*reversed(pairs))
        operator, direction, target = key
        print(
            f"{operator:12}{direction:10}{target:22}{len(old):8}{len(new):8}{len(lost[key]):6}{len(gained):8}"
        )
    for key, lines in lost.items():
        for line in lines:
            print("lost:", *key, "|", line)
    return not any(lost.values())


def gaps(rows: dict[Key, list[Row]]) -> None:
    """Prints what an operator is tested on for some targets and not for others with this field and dtype."""
    for operator, direction in sorted({key[:2] for key in rows}):
        targets = {key[2]: pairs_of(of) for key, of in rows.items() if key[:2] == (operator, direction)}
        everywhere = set().union(*targets.values())
        for target, pairs in sorted(targets.items()):
            fields, dtypes = {field for field, *_ in pairs}, {dtype for *_, dtype in pairs}
            possible = {pair for pair in everywhere if pair[0] in fields and pair[2] in dtypes}
            for line in without(possible, pairs):
                print(operator, direction, target, "|", line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, folders in (("compare", ("before", "after")), ("list", ("folder",)), ("gaps", ("folder",))):
        command = commands.add_parser(name)
        for folder in folders:
            command.add_argument(folder, type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return 0 if compare(read(arguments.before), read(arguments.after)) else 1
    rows = read(arguments.folder)
    if arguments.command == "gaps":
        gaps(rows)
        return 0
    for _, of in sorted(rows.items()):
        for row in of:
            print("; ".join(f"{field} {value}" for field, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
