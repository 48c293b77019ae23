"""A mutant: one plausible mistake in a kernel's source, which the operators' tests must find."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """In ``file``, ``mutated`` takes the place of ``original``, which occurs there exactly once.

    In C++ both are an expression, or both are statements, which end with a semicolon: one build holds all
    mutants, see `behind_a_number`.
    """

    name: str  # what is wrong
    target: str  # the implementation whose tests run, of run.py's SELECTIONS
    operator: str  # "pool_mixer" or "mlp"
    file: str  # from the root of the repository on
    original: str
    mutated: str
    only: str = ""  # pytest's -k, with which fewer tests of the selection find it sooner


def mutants_of(target: str, operator: str, files: dict[str, list[tuple[str, ...]]]) -> tuple[Mutant, ...]:
    """Those of one operator. Of each file: (what is wrong, the original, the mutated, perhaps `only`)."""
    return tuple(
        Mutant(name, target, operator, file, *how) for file, own in files.items() for name, *how in own
    )


def replaced(text: str, mutant: Mutant) -> str:
    """The text with the mistake."""
    count = text.count(mutant.original)
    assert count == 1, f"{mutant.name}: {mutant.original!r} occurs {count} times in {mutant.file}"
    assert mutant.mutated != mutant.original, mutant.name
    return text.replace(mutant.original, mutant.mutated)


def behind_a_number(text: str, mutants: Iterable[tuple[int, Mutant]]) -> str:
    """The text with all the mistakes, each made only where ``pk_mutant`` is its number."""
    for number, mutant in mutants:
        if mutant.original.endswith(";"):
            both = f"if (pk_mutant == {number}) {{ {mutant.mutated} }} else {{ {mutant.original} }}"
        else:
            both = f"(pk_mutant == {number} ? ({mutant.mutated}) : ({mutant.original}))"
        text = replaced(text, Mutant(**{**vars(mutant), "mutated": both}))
    return text


# What every source that has mutants includes first, and where the number comes from
DECLARATION = 'extern "C" __attribute__((visibility("hidden"))) int pk_mutant;\n'
DEFINITION = f"""#include <cstdlib>
{DECLARATION}
static int chosen() {{
  const char* number = std::getenv("POOLFORMER_TEST_MUTANT");
  return number == nullptr ? 0 : std::atoi(number);
}}
int pk_mutant = chosen();
"""
