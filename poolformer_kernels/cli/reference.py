"""The command line as a Markdown page: `python -m poolformer_kernels.cli.reference`.

It is made of the parsers themselves, so it says what `--help` says. Needs the extras of training and of the
benchmarks' tables: pip install 'poolformer_kernels[train]'.
"""

import argparse
import sys
from dataclasses import dataclass

from .errors import report_errors
from .main import load_benchmark
from .parser import BENCHMARKS, parser, subparsers

__all__ = ["Section", "markdown", "sections"]

_ESCAPED = str.maketrans({"<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\|*`_"})


@dataclass(frozen=True)
class Section:
    """A command: its parser, and further groups of options by title."""

    parser: argparse.ArgumentParser
    more: dict[str, list[argparse.Action]]

    @property
    def name(self) -> str:
        """As it is typed: ``poolformer-kernels bench model``."""
        return self.parser.prog

    @property
    def options(self) -> list[argparse.Action]:
        """What the command takes, without ``--help`` and without commands of its own."""
        unlisted = argparse._HelpAction | argparse._SubParsersAction
        return [action for action in self.parser._actions if not isinstance(action, unlisted)]


def sections() -> list[Section]:
    """The whole command line in the order of ``--help``; a benchmark is a command of its own.

    Raises:
        CommandError: an extra is missing.
    """
    from .train import TASKS, add_recipe

    top = parser()
    found = [Section(top, {})]
    for name, command in subparsers(top).items():
        more = {}
        if name == "train":
            for task in TASKS.values():
                group = add_recipe(argparse.ArgumentParser(), task.kind)
                more[group.title] = group._group_actions
        found.append(Section(command, more))
        if name == "bench":
            for benchmark in BENCHMARKS:
                found.append(Section(load_benchmark(benchmark).parser(f"{command.prog} {benchmark}"), {}))
    return found


def markdown() -> str:
    """The page: a heading, the usage and a table of options for each command."""
    parts = ["# Command line", "`python -m poolformer_kernels` is the same as `poolformer-kernels`."]
    for section in sections():
        parts += [f"## {section.name}", *_description(section.parser)]
        parts.append(_usage(section))
        parts += _table(section.options)
        for title, options in section.more.items():
            parts += [f"### {title[0].upper()}{title[1:]}", *_table(options)]
    return "\n\n".join(parts) + "\n"


def _description(command: argparse.ArgumentParser) -> list[str]:
    """The description; one that is laid out in lines stays so."""
    if not command.description:
        return []
    if command.formatter_class is argparse.RawDescriptionHelpFormatter:
        return [_fenced(command.description.strip())]
    return [" ".join(command.description.split()).translate(_ESCAPED)]


def _usage(section: Section) -> str:
    formatter = section.parser.formatter_class(section.name, width=100)  # whatever the terminal's
    commands = [a for a in section.parser._actions if isinstance(a, argparse._SubParsersAction)]
    formatter.add_usage(None, [*section.options, *commands], [])
    return _fenced(formatter.format_help().strip())


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def _table(options: list[argparse.Action]) -> list[str]:
    if not options:
        return []
    rows = [f"| `{_call(option)}` | {_help(option)} |" for option in options]
    return ["\n".join(["| option | meaning |", "|---|---|", *rows])]


def _call(option: argparse.Action) -> str:
    """How the option is written: ``--image FILE …``."""
    names = ", ".join(option.option_strings)
    metavar = option.metavar
    if metavar is None:
        metavar = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else option.dest.upper()
    values = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    if option.nargs == 0:
        values = ""
    elif option.nargs == "?":
        values = f"[{values}]"
    elif option.nargs in ("+", "*", argparse.REMAINDER):
        values += " …"
    return f"{names} {values}".strip().replace("|", r"\|")


def _help(option: argparse.Action) -> str:
    text = (option.help or "") % {**vars(option), "prog": "poolformer-kernels"}
    if option.required and option.option_strings:
        text += " (required)"
    return " ".join(text.split()).translate(_ESCAPED)


def main() -> int:
    """Print the page; the exit code."""

    def command() -> int:
        sys.stdout.write(markdown())
        return 0

    return report_errors("poolformer-kernels", command)


if __name__ == "__main__":
    sys.exit(main())
