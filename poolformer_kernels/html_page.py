"""What the HTML reports share: one self-contained file, in the reader's light or dark mode.

A page requests nothing: pictures are part of it (`data_uri`), and there is no script.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

from PIL import Image

__all__ = ["data_uri", "image_uri", "page", "table_of", "tiles"]

_STYLE = """
:root { --bg:#f6f7f9; --card:#fff; --ink:#1a1f29; --soft:#5b6474; --line:#e1e5eb; --good:#1b7f4b;
  --goodbg:#e3f4ea; --bad:#b3261e; --badbg:#fbe6e4 }
@media (prefers-color-scheme: dark) { :root { --bg:#11151c; --card:#1a2029; --ink:#e6eaf1; --soft:#9aa5b5;
  --line:#2b333f; --good:#6fd6a0; --goodbg:#173527; --bad:#ff9a91; --badbg:#431f1c } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:960px; margin:0 auto; padding:40px 20px 64px }
h1 { font-size:27px; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere }
h2 { font-size:18px; margin:0 0 4px }
h3 { font-size:14px; margin:18px 0 2px }
p { margin:4px 0 12px } .soft { color:var(--soft) } small, .small { font-size:13px }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:22px 24px;
  margin-top:20px }
.verdict { display:inline-block; font-weight:600; border-radius:999px; padding:3px 14px; margin:6px 0 2px }
td .verdict { padding:0 10px; margin:0; font-size:13px }
.good { color:var(--good); background:var(--goodbg) } .bad { color:var(--bad); background:var(--badbg) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(250px,1fr)); gap:14px; margin-top:20px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:14px 18px }
.tile b { display:block; font-size:24px; line-height:1.3; letter-spacing:-.01em }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th { text-align:left; font-weight:600; font-size:13px; color:var(--soft) }
th, td { padding:6px 12px 6px 0; border-bottom:1px solid var(--line); white-space:nowrap }
tr:last-child td { border-bottom:0 } .num { text-align:right }
td.wrap { white-space:normal; overflow-wrap:anywhere }
"""


def page(title: str, body: str, style: str) -> str:
    """The whole document.

    Args:
        title: of the window, as plain text.
        body: HTML, what it holds of other people's text escaped.
        style: CSS of this page, after what the pages share.
    """
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{escape(title)} · poolformer-kernels</title>
<style>{_STYLE}{style.lstrip()}</style></head><body><main>
{body}
</main></body></html>
"""


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """A row of boxes: a large value (plain text), and below it what it is."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span class="soft small">{escape(what)}</span></div>'
        for value, what in values
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table_of(values: Mapping[str, str]) -> str:
    """A table of names and values, both plain text; long values wrap."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td class='wrap'>{escape(value)}</td></tr>"
        for key, value in values.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def data_uri(content: bytes, kind: str) -> str:
    """A file as part of the page; ``kind`` is its media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_uri(image: Image.Image, lossless: bool = False) -> str:
    """A picture as part of the page: a JPEG, or a PNG where it must be exact."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=90)
    return data_uri(buffer.getvalue(), "image/png" if lossless else "image/jpeg")
