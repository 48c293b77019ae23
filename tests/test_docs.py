"""README and the pages of docs/: their code runs, commands exist, tables leave nothing out."""

import re
import shlex
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration
from support.processes import ROOT, python

from poolformer_kernels.cli.reference import sections

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"`((?:poolformer-kernels|make) [^`]+)`")
VARIABLE = re.compile(r"POOLFORMER_KERNELS_[A-Z_]*[A-Z]")


def blocks(page: Path, kind: str) -> list[re.Match]:
    return [match for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match["kind"] == kind]


def commands(page: Path) -> list[str]:
    """What the page tells to type: in console blocks behind ``$``, in sh blocks, and within sentences."""
    lines = [line for block in blocks(page, "console") for line in block["text"].splitlines()]
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    typed += [line for block in blocks(page, "sh") for line in block["text"].splitlines()]
    return typed + INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def script(page: Path) -> str:
    """The blocks that are run, on the lines that they have on the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in blocks(page, "python"):
        if block["reason"] is None:
            first = text.count("\n", 0, block.start("text"))
            code = block["text"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


# ---- code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in TEXTS if blocks(p, "python")], ids=lambda page: page.stem)
def test_every_block_compiles(page):
    for block in blocks(page, "python"):
        compile(block["text"], page.name, "exec")
        assert block["reason"] is None or block["reason"].startswith("needs "), "say what it needs"


@pytest.mark.long
@pytest.mark.parametrize("page", [p for p in TEXTS if script(p).strip()], ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path):
    """In order, in one process, in an empty folder."""
    file = tmp_path / f"{page.stem}.py"
    file.write_text(script(page), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    python(file, cwd=work, HF_HUB_OFFLINE="1")
    assert list(work.iterdir()) == [], "a page leaves files where it is tried"


# ---- commands ----------------------------------------------------------------------------------------------


def test_commands_have_their_options():
    known = {}
    for section in sections():
        options = [*section.options, *(option for group in section.more.values() for option in group)]
        known[section.name] = {name for option in options for name in option.option_strings}
    found = 0
    for page in TEXTS:
        for line in commands(page):
            words = shlex.split(line.replace("-m poolformer_kernels", "poolformer-kernels"), comments=True)
            if "poolformer-kernels" not in words:
                continue
            words = words[words.index("poolformer-kernels") :]
            name = next(" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in known)
            assert name != "poolformer-kernels" or words[1].startswith("-"), f"{page.name}: no command {line}"
            given = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
            assert given <= known[name], f"{page.name}: {line}"
            found += 1
    assert found > 30


def test_make_has_its_targets():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    typed = [shlex.split(line, comments=True) for page in TEXTS for line in commands(page)]
    targets = {word for words in typed if words[0] == "make" for word in words[1:] if "=" not in word}
    assert len(targets) > 5
    assert targets <= set(phony)


# ---- tables ------------------------------------------------------------------------------------------------


def first_column(page: str) -> set[str]:
    """The names in backticks in the first column of a page's tables."""
    rows = re.findall(r"^\| (`[^|]+) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_environment_variable_is_listed():
    files = [ROOT / "setup.py", *(ROOT / "tests").rglob("*.py")]
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
    for folder in ("poolformer_kernels", "benchmarks", "csrc"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    texts = [file.read_text(encoding="utf-8") for file in files if file != Path(__file__)]
    read = {name for text in texts for name in VARIABLE.findall(text)}
    listed = {name for name in first_column("backends.md") if VARIABLE.fullmatch(name)}
    assert {"POOLFORMER_KERNELS_ISA", "POOLFORMER_KERNELS_SKIP_EXT"} <= listed
    assert listed == read


def test_every_extra_is_listed():
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    assert first_column("install.md") == project["optional-dependencies"].keys()


def test_every_page_is_in_the_menu():
    """And all that are listed are there, or are made when the pages are built."""
    made = {"commands.md", *re.findall(r"api/\w+\.md", (ROOT / "mkdocs.yml").read_text())}
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in PAGES} | made


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
