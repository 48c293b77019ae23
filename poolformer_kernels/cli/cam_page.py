"""What `poolformer-kernels cam` shows: maps over pictures, and a page of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import matplotlib.colors
import numpy as np
from PIL import Image
from torch import Tensor

from .. import html_page

__all__ = ["MARK", "Answer", "Figure", "overlay", "render"]

MARK = "<!-- poolformer-kernels cam -->"  # in a page of this command, whose folder it may write to again
_SMALL = 96  # px: smaller pictures are shown with their pixels
_COLOURS = matplotlib.colormaps["jet"]

_STYLE = """
main { max-width:max(960px, min(1600px, calc(190px * var(--n)))) }
.row { display:grid; grid-template-columns:repeat(var(--n), minmax(0, 270px)); gap:18px 12px;
  padding:16px 0; border-bottom:1px solid var(--line) }
.row:last-child { border-bottom:0; padding-bottom:0 }
@media (min-width:701px) { .pairs { display:grid; grid-template-columns:1fr 1fr; column-gap:36px }
  .pairs .row { border:0 } }
figure { margin:0; min-width:0 } figcaption { font-size:13px; line-height:1.4; margin-top:6px }
figure img { display:block; width:100%; aspect-ratio:1; border-radius:8px; background:var(--bg) }
img.small { image-rendering:pixelated }
figcaption b { overflow-wrap:anywhere } figcaption div { overflow-wrap:anywhere }
.answer { display:flex; justify-content:space-between; gap:8px } .answer span + span { flex:none }
.legend { display:flex; align-items:center; gap:10px; font-size:13px; color:var(--soft); margin:10px 0 2px;
  flex-wrap:wrap }
.legend i { width:160px; height:12px; border-radius:6px; flex:none }
.warn { border-radius:8px; padding:8px 14px; margin:12px 0 0 }
td:first-child { padding-right:28px } .source { margin-top:18px }
@media (max-width:700px) { .row { grid-template-columns:repeat(2, minmax(0, 1fr)) }
  section { padding:18px 16px } main { padding:24px 12px 48px } }
"""


@dataclass(frozen=True)
class Answer:
    """A class, and the probability that a model gives it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Figure:
    """The map of one model over a picture: of the class ``target``, which may be the one predicted."""

    model: str
    image: Image.Image
    predicted: Answer
    target: Answer
    zero: bool  # nothing speaks for the class


def overlay(image: Image.Image, cam: Tensor) -> Image.Image:
    """A map ``[H, W]`` in [0, 1] over a picture of its size: half and half, and as bright as it can be.

    Source: misc/cam_image.py of sail-sg/poolformer, by ``show_cam_on_image`` of pytorch-grad-cam.
    """
    heat = _COLOURS(cam.cpu().numpy())[..., :3]
    mixed = (np.asarray(image) / 255 + heat) / 2
    return Image.fromarray((mixed / mixed.max() * 255).round().astype(np.uint8))


def render(
    rows: Sequence[tuple[str, Image.Image, Sequence[Figure]]],
    models: Sequence[Mapping[str, str]],
    warnings: Sequence[str],
) -> str:
    """The page as text.

    Args:
        rows: of each picture its name, itself as the first model sees it, and a figure for each model.
        models: of each model the same names, and their values, for a table.
        warnings: plain sentences that belong at the top.
    """
    columns = 1 + len(models)
    pictures = "".join(_row(*row) for row in rows)
    notes = "".join(f'<p class="warn bad">{escape(text)}</p>' for text in warnings)
    plural = "s" if len(rows) > 1 else ""
    body = f"""{MARK}
<style>:root {{ --n:{columns} }}</style>
<h1>Grad-CAM of {len(rows)} picture{plural}</h1>
<p class="soft">How much each place of a picture speaks for a class, in the last layers of each model.</p>
{notes}
<section><h2>Pictures and maps</h2>
<p class="soft small">Each picture is resized to the model's size without a crop, as the official code does.
A map is stretched from its own lowest to its own highest value: colours do not compare between maps.</p>
<div class="legend"><span>little</span><i style="background:{_gradient()}"></i><span>much</span></div>
<div{' class="pairs"' if len(models) == 1 and len(rows) > 1 else ""}>{pictures}</div></section>
<section><h2>Models</h2>{_table(models)}</section>
<p class="soft small source">Grad-CAM (arXiv 1610.02391) by captum; the layers are those of the MetaFormer
paper (arXiv 2111.11418).</p>"""
    return html_page.page("Grad-CAM", body, _STYLE)


def _row(name: str, picture: Image.Image, figures: Sequence[Figure]) -> str:
    first = _figure(picture, name, f"<b>{_breakable(name)}</b>")
    return f'<div class="row">{first}{"".join(map(_map, figures))}</div>'


def _map(figure: Figure) -> str:
    caption = f"<b>{_breakable(figure.model)}</b>{_answer(figure.predicted)}"
    if figure.target != figure.predicted:
        caption += f'<div class="soft">the map is of</div>{_answer(figure.target)}'
    if figure.zero:
        caption += '<div class="soft">nothing speaks for it: the map is zero</div>'
    return _figure(figure.image, f"{figure.model}: map of {figure.target.name}", caption)


def _breakable(name: str) -> str:
    """A name with underscores, after which a narrow column may break it."""
    return escape(name).replace("_", "_<wbr>")


def _answer(answer: Answer) -> str:
    return (
        f'<div class="answer"><span>{escape(answer.name)}</span><span>{answer.probability:.1%}</span></div>'
    )


def _figure(image: Image.Image, alt: str, caption: str) -> str:
    small = max(image.size) <= _SMALL
    uri = html_page.image_uri(image, lossless=small)
    kind = ' class="small"' if small else ""
    return f'<figure><img{kind} src="{uri}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _gradient() -> str:
    stops = (matplotlib.colors.to_hex(_COLOURS(i / 8)) for i in range(9))
    return f"linear-gradient(90deg,{','.join(stops)})"


def _table(models: Sequence[Mapping[str, str]]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in models[0])
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in model.values())}</tr>" for model in models
    )
    return f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>'
