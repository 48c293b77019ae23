"""What `mkdocs build` adds: generated pages, equations as MathML, pictures, checks of the site."""

import dataclasses
import importlib
import inspect
import logging
import pprint
import re
import types
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from poolformer_kernels.cli import reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "poolformer_kernels"
# page -> the modules that it documents, each with names of it, or None for its `__all__`
API: dict[str, dict[str, tuple[str, ...] | None]] = {
    "index": {"": None},
    "ops": {".ops": None},
    "nn": {".nn": None},
    "models": {".models": None},
    "dense": {".dense": None},
    "gradcam": {".gradcam": None},
    "train": {
        ".train": (),
        ".train.recipe": ("resolve", "read_yaml", "write_yaml", "Recipe", "RecipeError", "PRESETS"),
        ".train.dense_recipe": None,
        ".train.data": ("open_data",),
        ".train.processes": ("start", "Processes"),
        ".train.loop": ("train", "RunError"),
        ".train.evaluation": ("evaluate", "predict", "Evaluation"),
    },
    "profiling": {".profiling": None, ".profiling.dense": None, ".profiling.paper": None},
    "reference": {".reference": None, ".numerics": None},
}


# ---- generated pages ---------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API reference, the command line and the plots, which lie elsewhere in the repository."""
    for name in API:
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name)))
    files.append(File.generated(config, "commands.md", content=reference.markdown()))
    for plot in sorted((ROOT / "benchmarks" / "plots").glob("*.png")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def api_page(page: str) -> str:
    """Markdown of a page of the API reference."""
    parts = []
    for suffix, names in API[page].items():
        module = importlib.import_module(PACKAGE + suffix)
        level = "#" if not parts else "##"
        text = as_markdown(module.__doc__.replace("`..", "`"))
        parts.append(f"{level} {module.__name__}\n\n{text}\n")
        parts += [_entry(module, name) for name in (module.__all__ if names is None else names)]
    return "\n".join(parts)


def _entry(module: types.ModuleType, name: str) -> str:
    value = getattr(module, name)
    if isinstance(value, types.ModuleType):
        page = value.__name__.rpartition(".")[2]
        text = inspect.cleandoc(value.__doc__).partition("\n")[0]
        more = f" See [its page]({page}.md)." if page in API else ""
        return f"## `{name}` {{#{value.__name__}}}\n\nA module. {text}{more}\n"
    if inspect.isclass(value) or inspect.isfunction(value):
        path = f"::: {value.__module__}.{value.__qualname__}\n"
        if dataclasses.is_dataclass(value) and all(f.metadata for f in dataclasses.fields(value)):
            return f"{path}    options: {{show_signature: false, members: false}}\n\n{_fields(value)}\n"
        return path
    if isinstance(value, dict) and any(map(callable, value.values())):
        value = tuple(value)  # of a table of functions the names
    shown = pprint.pformat(value, width=88, compact=True)
    return f"## `{name}` {{#{module.__name__}.{name}}}\n\n```python\n{name} = {shown}\n```\n"


def _fields(recipe: type) -> str:
    """A table of the fields of a recipe, whose metadata say what each is."""
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in dataclasses.fields(recipe)]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


class Docstrings(griffe.Extension):
    """Docstrings of the package as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``word::`` becomes ``word:``, a table between lines of ``=`` a block, double backticks single ones."""
    lines, inside = [], False
    for line in inspect.cleandoc(text).split("\n"):
        if re.fullmatch(r"=+( +=+)*", line):
            lines.append("```text" if not inside else "```")
            inside = not inside
            continue
        lines.append(line.replace("``", "") if inside else re.sub(r"::$", ":", line))
    text = re.sub(r"^Example:\n(?=    )", "Example:\n\n", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"``([^`\n]+)``", r"`\1`", text)


# ---- what Markdown does not do -----------------------------------------------------------------------------

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
_PICTURE = re.compile(r'<p><img alt="([^"]*)" src="assets/([\w-]+)\.svg" ?/?></p>')


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations as MathML, which browsers draw by themselves; SVGs in the page, in its theme's colours."""
    html = _EQUATION.sub(_mathml, html)
    return _PICTURE.sub(_inline, html)


def _mathml(match: re.Match) -> str:
    latex = match[3].strip()
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(entity, character)
    return convert(latex, display="block" if match[2] == "[" else "inline")


def _inline(match: re.Match) -> str:
    svg = (ROOT / "docs" / "assets" / f"{match[2]}.svg").read_text(encoding="utf-8")
    svg = svg.replace("<svg ", f'<svg class="picture" role="img" aria-label="{match[1]}" ', 1)
    return f'<div class="picture-frame">{svg}</div>'


# ---- checks ------------------------------------------------------------------------------------------------

_LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="?(?:https?:)?//[^">\s]+'
    r'|<link(?=[^>]*\brel="?(?:stylesheet|icon|preconnect|preload))[^>]*\bhref="?(?:https?:)?//[^">\s]+'
)
_LINK = re.compile(r'<a[^>]*\bhref="?(https?://[^">\s]+)')
_log = logging.getLogger("mkdocs.hooks")


def on_post_build(config: MkDocsConfig) -> None:
    """Lists the links that lead out of the site, which nothing here follows.

    Raises:
        PluginError: a page would load something from elsewhere, or an equation was left as LaTeX.
    """
    site, links = Path(config.site_dir), set()
    for page in sorted(site.rglob("*.html")):
        html = page.read_text(encoding="utf-8")
        if found := _LOADED.search(html):
            raise PluginError(f"{page.relative_to(site)} loads from elsewhere: {found[0]}")
        if 'class="arithmatex"' in html:
            raise PluginError(f"{page.relative_to(site)} has an equation that is not MathML")
        links.update(_LINK.findall(html))
    for link in sorted(links):
        _log.info("leads out of the site, not followed: %s", link)
