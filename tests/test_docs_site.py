"""The site that `make docs` builds: all of the API, docstrings as Markdown, nothing from elsewhere."""

import importlib
import inspect
import runpy
import types

import pytest
from support.peers import require
from support.processes import ROOT, python

import poolformer_kernels as pk

for package in ("mkdocs", "mkdocstrings", "latex2mathml", "griffe"):
    require(package)


@pytest.fixture(scope="module")
def hooks() -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "hooks.py")))


def test_every_public_name_is_in_the_reference(hooks):
    documented = {f"poolformer_kernels{suffix}" for page in hooks.API.values() for suffix in page}
    page = hooks.api_page("index")
    for name in pk.__all__:
        value = getattr(pk, name)
        if inspect.ismodule(value):
            assert f"## `{name}` {{#{value.__name__}}}" in page
            assert value.__name__ in documented or name == "backends"
        else:
            assert f"::: {value.__module__}.{value.__qualname__}\n" in page
    for name in ("ops", "nn", "models", "dense", "gradcam", "profiling", "reference"):
        page = hooks.api_page(name)
        for public in importlib.import_module(f"poolformer_kernels.{name}").__all__:
            assert f".{public}\n" in page or f"`{public}`" in page, f"{name}.{public}"


def test_fields_of_a_recipe_are_a_table(hooks):
    assert "\n| `keep` | `3` | checkpoints that are kept |\n" in hooks.api_page("train")


def test_docstrings_as_markdown(hooks):
    text = "Adds ``a`` to b::\n\n    a + b\n\n====  ====\n``a``  1\n====  ====\n\nExample:\n    >>> 1\n"
    expected = "Adds `a` to b:\n\n    a + b\n\n```text\na  1\n```\n\nExample:\n\n    >>> 1"
    assert hooks.as_markdown(text) == expected


def test_equations_are_mathml(hooks):
    html = '<p>of <span class="arithmatex">\\(a &lt; b_1\\)</span></p>'
    made = hooks.on_page_content(html, None, None, None)
    assert made.startswith('<p>of <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<msub><mi>b</mi><mn>1</mn></msub>" in made
    assert "<mo>&#x0003C;</mo>" in made


@pytest.mark.parametrize(
    ("html", "wrong"),
    [
        ('<script src="https://unpkg.com/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ("<link rel=stylesheet href=https://fonts.example/css>", True),
        ('<img alt="" src="http://example.org/a.png">', True),
        ('<span class="arithmatex">\\(a\\)</span>', True),
        ('<a href="https://arxiv.org/abs/2111.11418">paper</a><img src="plots/a.png">', False),
    ],
)
def test_pages_that_load_from_elsewhere_are_refused(hooks, html, wrong, tmp_path, caplog):
    (tmp_path / "page.html").write_text(html)
    config = types.SimpleNamespace(site_dir=str(tmp_path))
    if wrong:
        with pytest.raises(hooks.PluginError, match=r"page\.html"):
            hooks.on_post_build(config)
        return
    with caplog.at_level("INFO", logger="mkdocs.hooks"):
        hooks.on_post_build(config)
    assert [record.args[0] for record in caplog.records] == ["https://arxiv.org/abs/2111.11418"]


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    """Links and anchors included; every name of the package and every command has an anchor."""
    words = ("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    python(*words, cwd=ROOT, NO_MKDOCS_2_WARNING="1")
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in pk.__all__:
        value = getattr(pk, name)
        anchor = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        assert f'id="{anchor}"' in page, name
    assert 'id="poolformer-kernels-bench-model"' in (tmp_path / "commands.html").read_text(encoding="utf-8")
    assert "<svg" in (tmp_path / "kernels_cpu.html").read_text(encoding="utf-8")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".py", ".pyc")]
