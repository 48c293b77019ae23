"""The page of the command line: every command and option is on it, once, in Markdown."""

import re

import pytest
import torch
from support.peers import require

for package in ("matplotlib", "rich", "safetensors", "timm", "yaml"):
    require(package)

from markdown_it import MarkdownIt  # rich needs it

from poolformer_kernels.cli.main import main
from poolformer_kernels.cli.parser import BENCHMARKS, parser, subparsers
from poolformer_kernels.cli.reference import markdown, sections


@pytest.fixture(scope="module")
def page() -> str:
    return markdown()


def tokens_of(page: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page)


def tables(page: str) -> dict[str, list[list[str]]]:
    """By heading: the rows of its table, cells as Markdown without their escapes."""
    found, heading, cell = {}, "", None
    for token in tokens_of(page):
        if token.type == "heading_open":
            heading = None
        elif token.type == "tr_open":
            found.setdefault(heading, []).append([])
        elif token.type in ("th_open", "td_open"):
            cell = found[heading][-1]
        elif token.type in ("th_close", "td_close"):
            cell = None
        elif token.type == "inline" and heading is None:
            heading = token.content
        elif token.type == "inline" and cell is not None:
            cell.append("".join(child.content for child in token.children))
    return found


def test_every_command_and_option_is_on_the_page(page) -> None:
    found = tables(page)
    commands = [f"poolformer-kernels {name}" for name in subparsers(parser())]
    commands += [f"poolformer-kernels bench {name}" for name in BENCHMARKS]
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert sorted(headings) == sorted(["poolformer-kernels", *commands])
    for section in sections():
        groups = {section.name: section.options}
        groups |= {f"{title[0].upper()}{title[1:]}": options for title, options in section.more.items()}
        for title, options in groups.items():
            head, *rows = found.get(title, [["option", "meaning"]])
            assert head == ["option", "meaning"]
            assert len(rows) == len(options), title
            for option, (call, meaning) in zip(options, rows, strict=True):
                words = re.split(r"[ ,]+", call)
                assert set(option.option_strings) <= set(words), (title, call)
                assert len(meaning) > 5, f"{title}: {call} has no help"
                assert "%(" not in meaning


def test_help_has_no_option_that_the_page_lacks(page, capsys) -> None:
    """Those of training's recipes and of the benchmarks included."""
    for words in (["demo"], ["train", "--task", "segmentation"], ["bench", "dense"], ["cam"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", capsys.readouterr().out)) - {"--help"}
        assert len(options) > 5
        assert sorted(option for option in options if option not in page) == []


def test_words_of_markdown_are_escaped(page) -> None:
    """No option's text became a tag, an emphasis or a cell of its own."""
    kinds = set()
    for token in tokens_of(page):
        kinds.update(child.type for child in token.children or ())
    assert kinds == {"text", "code_inline", "text_special"} or kinds == {"text", "code_inline"}
    assert "results/<device>/<name>.csv" in tables(page)["poolformer-kernels bench model"][7][1]


def test_the_page_does_not_depend_on_the_machine(page, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert markdown() == page
    finally:
        torch.set_num_threads(threads)


def test_defaults_of_help_are_those_of_the_parser() -> None:
    for section in sections():
        for option in section.options:
            text = option.help or ""
            number = isinstance(option.default, (int, float)) and not isinstance(option.default, bool)
            if number and option.dest != "threads":
                assert "%(default)s" in text or str(option.default) in text, (section.name, option.dest)
