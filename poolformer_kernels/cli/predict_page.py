"""The page of `poolformer-kernels predict`: each picture with what was found beside it."""

from collections.abc import Sequence
from html import escape

from PIL import Image

from .. import html_page
from ..drawing import colour_of, share_text

__all__ = ["render", "section"]

_STYLE = """
.found { display:grid; grid-template-columns:minmax(0,3fr) minmax(0,2fr); gap:22px; align-items:start }
.found img { display:block; width:100%; height:auto; border-radius:6px }
.found img.small-picture { width:auto; max-width:100%; min-width:min(100%,320px); image-rendering:pixelated }
.found .scroll { max-height:640px; overflow-y:auto }
.found td:first-child { white-space:normal; overflow-wrap:anywhere }
.found td, .found th { padding-right:8px }
i.chip { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:7px;
  border:1px solid var(--line) }
@media (max-width: 700px) { main { padding:24px 10px 40px } section { padding:16px 14px }
  .found { grid-template-columns:minmax(0,1fr) } }
"""
_WIDEST = 1400  # pixels of a picture on the page


def render(facts: dict, sections: Sequence[str]) -> str:
    """The page as text.

    Args:
        facts: the JSON's ``model``.
        sections: of the images, see `section`.
    """
    count = f"{len(sections)} picture{'s' if len(sections) != 1 else ''}"
    title = f"{facts['name']}: {facts['task']}"
    table = {
        "checkpoint": facts["checkpoint"],
        "names of its tensors": facts["names_of"],
        "classes": str(facts["classes"]),
        "image size": " to ".join(f"{side} pixels" for side in dict.fromkeys(facts["image_size"])),
        "lowest score": "–" if facts["score"] is None else f"{facts['score']:g}",
        "precision, device": f"{facts['precision']}, {facts['device']}",
    }
    body = f"""<h1>{escape(title)}</h1>
<p class="soft">{count}; predictions.json beside this page has every figure.</p>
{"".join(sections)}
<section><h2>Model</h2>{html_page.table_of(table)}</section>"""
    return html_page.page(title, body, _STYLE)


def section(name: str, picture: Image.Image, entry: dict) -> str:
    """HTML of an image: what was found, drawn and in a table.

    Args:
        name: of the image.
        picture: with what was found; below the image's own height there may be a legend, which is left out.
        entry: the image's in the JSON.
    """
    width, height = entry["size"]
    picture = picture.crop((0, 0, width, height))
    small = max(picture.size) < 320
    if picture.width > _WIDEST:
        picture = picture.resize((_WIDEST, max(1, round(height * _WIDEST / width))), Image.Resampling.LANCZOS)
    name = escape(name)
    kind = ' class="small-picture"' if small else ""
    image = f'<img{kind} src="{html_page.image_uri(picture, small)}" alt="{name} with what was found">'
    return (
        f'<section><h2>{name}</h2><p class="soft small">{width} × {height} pixels</p>'
        f'<div class="found"><div>{image}</div><div class="scroll">{_table(entry)}</div>'
        "</div></section>"
    )


def _table(entry: dict) -> str:
    if "detections" in entry:
        if not entry["detections"]:
            return '<p class="soft">Nothing found.</p>'
        rows = [
            (d["label"], d["name"], f"{100 * d['score']:.1f} %", _box_text(d["box"]))
            for d in entry["detections"]
        ]
        return _rows(("object", "score", "x, y, width × height"), rows)
    if "classes" in entry:
        total = entry["size"][0] * entry["size"][1]
        rows = [
            (c["label"], c["name"], share_text(c["pixels"], total), f"{c['pixels']:,}")
            for c in entry["classes"]
        ]
        return _rows(("class", "share", "pixels"), rows)
    rows = [(None, c["name"], f"{100 * c['probability']:.1f} %", str(c["label"])) for c in entry["top"]]
    return _rows(("class", "probability", "number"), rows)


def _box_text(box: Sequence[float]) -> str:
    x1, y1, x2, y2 = box
    return f"{x1:.0f}, {y1:.0f}, {x2 - x1:.0f} × {y2 - y1:.0f}"


def _rows(heads: Sequence[str], rows: Sequence[tuple]) -> str:
    """A table whose first column has the class's colour before its name."""
    body = []
    for label, name, *values in rows:
        chip = ""
        if label is not None:
            chip = f'<i class="chip" style="background:rgb{colour_of(label)}"></i>'
        cells = "".join(f'<td class="num">{escape(value)}</td>' for value in values)
        body.append(f"<tr><td>{chip}{escape(name)}</td>{cells}</tr>")
    first, *others = heads
    head = f"<th>{first}</th>" + "".join(f'<th class="num">{other}</th>' for other in others)
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"
