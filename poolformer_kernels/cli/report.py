"""The demo's report: tables on the terminal, and an HTML page.

The page is one self-contained file that requests nothing and follows the reader's light or dark mode.
"""

import sys
from html import escape
from pathlib import Path

import rich.box
from PIL import Image
from rich.console import Console
from rich.table import Table

from .. import html_page
from .files import write_whole

__all__ = ["PROVIDERS", "print_tables", "render", "write_report"]

PROVIDERS = {"eager": "timm eager", "compile": "timm compiled", "ours": "ours"}  # key in the JSON -> name
_NAMES = {"mixer": "mixer", "mlp": "MLP", "model": "model"}
_WIDE = 120  # columns that the tables need; narrower ones leave the maximum errors and the spread out
_LABEL, _PLOT, _VALUE, _BAR, _GAP = (
    200,
    430,
    210,
    17,
    16,
)  # chart geometry in px: columns, bar height, group gap

_STYLE = """
:root { --grid:#d4d9e1; --eager:#9aa5b5; --compile:#4a7fc1; --ours:#e07b28 }
@media (prefers-color-scheme: dark) { :root { --grid:#343d4a; --eager:#77839a; --compile:#6fa3e0;
  --ours:#f0944a } }
.photos { display:grid; grid-template-columns:repeat(auto-fill,minmax(410px,1fr)); gap:24px; margin-top:14px }
.photo { display:flex; gap:18px; align-items:flex-start; min-width:0 }
.photo img { width:172px; height:172px; border-radius:8px; flex:none }
.photo ol { list-style:none; margin:6px 0 0; padding:0 } .photo div { flex:1; min-width:0 }
.photo li { position:relative; padding:1px 8px; margin-bottom:3px; display:flex;
  justify-content:space-between; gap:10px }
.photo li i { position:absolute; inset:0 auto 0 0; background:var(--ours); opacity:.26; border-radius:4px }
.photo li span { overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
svg { display:block; width:100%; height:auto; min-width:640px; max-width:840px; font-size:13px }
svg text { fill:var(--ink) }
svg .soft { fill:var(--soft) } svg .grid { stroke:var(--grid) }
svg .spread { stroke:var(--ink); stroke-width:1.3 }
.legend { display:flex; flex-wrap:wrap; gap:6px 20px; margin:8px 0 2px }
.legend i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:7px;
  vertical-align:-1px }
@media (max-width:520px) { .photos { grid-template-columns:1fr } .photo img { width:112px; height:112px } }
"""


def print_tables(result: dict) -> None:
    """Print the demo's result (see `poolformer_kernels.cli.demo`) as tables."""
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    model = result["model"]
    console.print(
        f"\n[bold]{model['name']}[/]: {model['params']:,} parameters, {model['macs_official_head']:,} MACs "
        f"at {model['input_size']}x{model['input_size']} (fvcore's count, official head)"
    )
    for key, value in (("weights", model["weights"]), *result["environment"].items()):
        console.print(f"  {key}: {value}", markup=False, soft_wrap=True)
    console.print()
    wide = console.width >= _WIDE
    console.print(_error_table(result["verification"], wide))
    console.print(_time_table(result["timing"], wide))
    for note in _notes(result):
        console.print(note, markup=False)
    if model["weights"].startswith("random"):
        console.print(
            "The weights are random, so the classes mean nothing; --checkpoint FILE gives real ones."
        )
    verdict = "[bold green]verified" if result["passed"] else "[bold red]VERIFICATION FAILED"
    console.print(f"{verdict}[/]: error(ours) <= 1.5 x error(timm eager) + rounding, both against float64")


def _error_table(rows: list[dict], wide: bool) -> Table:
    table = _table("Logits against float64")
    for name in ("dtype", "layout", "model"):
        table.add_column(name, no_wrap=True)
    kept = slice(None) if wide else slice(2)
    for name in ("relative L2", "allowed", "max", "allowed", "top-1", "top-5")[kept]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        verdict = {None: "", True: "[green]ok", False: "[bold red]FAILED"}[row["passed"]]
        table.add_row(
            row["dtype"], row["layout"], PROVIDERS[row["implementation"]], *_error_cells(row)[kept], verdict
        )
    return table


def _error_cells(row: dict) -> list[str]:
    keys = ("error_l2", "allowed_l2", "error_max", "allowed_max")
    cells = ["" if row[key] is None else f"{row[key]:.2e}" for key in keys]
    return [*cells, f"{row['top1_agreement']:.0%}", f"{row['top5_agreement']:.0%}"]


def _time_table(rows: list[dict], wide: bool) -> Table:
    title = "Milliseconds: interleaved medians" + " (20th to 80th percentile)" * wide
    table = _table(f"{title}, timm eager, timm compiled and ours, all in channels_last")
    for name in ("dtype", "part"):
        table.add_column(name, no_wrap=True)
    for name in ("eager", "compiled", "ours", "vs eager", "vs compiled"):
        table.add_column(name, justify="right", no_wrap=True)

    def cell(t: dict) -> str:
        if "median" not in t:
            return "-"
        return _digits(t["median"]) + f" ({_digits(t['p20'])}-{_digits(t['p80'])})" * wide

    for row in rows:
        t = row["providers"]
        ratios = (_ratio(t, base) or "-" for base in ("eager", "compile"))
        what = f"{_NAMES[row['what']]} {'x'.join(map(str, row['shape'][1:]))}"
        table.add_row(row["dtype"], what, *map(cell, t.values()), *ratios)
    return table


def _ratio(providers: dict, base: str, of: str = "ours") -> str:
    """How many times faster ``of`` is, after "~" where the machine was too busy to tell; "" where untimed."""
    if "median" not in providers[base]:
        return ""
    unsure = providers[base]["noisy"] or providers[of]["noisy"]
    return f"{'~' if unsure else ''}{providers[base]['median'] / providers[of]['median']:.2f}×"


def _notes(result: dict) -> list[str]:
    rows = result["timing"]
    missing = {p["unavailable"] for row in rows for p in row["providers"].values() if "median" not in p}
    notes = [f"timm compiled: {reason}" for reason in sorted(missing)]
    if any(p.get("noisy") for row in rows for p in row["providers"].values()):
        notes.append("~ : the machine was busy (20th and 80th percentile differ twofold), measure again.")
    return notes


def _table(title: str) -> Table:
    box = rich.box.SIMPLE_HEAD
    return Table(title=title, box=box, title_justify="left", title_style="bold", pad_edge=False)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def write_report(result: dict, photos: list[Image.Image], folder: Path) -> Path:
    """Write ``folder/index.html`` from the result (see `poolformer_kernels.cli.demo`); return its path."""
    page = folder / "index.html"
    write_whole(page, render(result, photos))
    return page


def render(result: dict, photos: list[Image.Image]) -> str:
    """The page as text; ``photos`` are what the model saw, in the order of ``result["images"]``."""
    model = result["model"]
    passed = result["passed"]
    verdict = "Verified against float64" if passed else "Verification FAILED"
    body = f"""<h1>{escape(model["name"])}: timm's against ours</h1>
<p class="soft">The same weights and photos through timm's modules and through poolformer-kernels' operators,
on {escape(result["environment"]["device"])}.</p>
<span class="verdict {"good" if passed else "bad"}">{verdict}</span>
{_tiles(result)}
{_photos(result, photos)}
{_verification(result["verification"])}
{_charts(result)}
<section><h2>Where this ran</h2>{html_page.table_of(result["environment"])}</section>"""
    return html_page.page(model["name"], body, _STYLE)


def _tiles(result: dict) -> str:
    tiles = []
    for row in result["timing"]:
        if row["what"] != "model":
            continue
        for base in ("eager", "compile"):
            mixers, mlps = (_range(result["timing"], what, row["dtype"], base) for what in ("mixer", "mlp"))
            model = _ratio(row["providers"], base)
            if mixers and mlps and model:
                what = f"mixers against {PROVIDERS[base]}, {row['dtype']}"
                tiles.append((mixers, f"{what}; MLPs {mlps}; the whole model {model}"))
    model = result["model"]
    tiles.append((f"{model['params'] / 1e6:.2f} M", f"parameters ({model['params']:,})"))
    macs = model["macs_official_head"]
    tiles.append((f"{macs / 1e9:.3f} G", f"MACs at {model['input_size']}² in fvcore's count ({macs:,})"))
    return html_page.tiles(tiles)


def _range(rows: list[dict], what: str, dtype: str, base: str) -> str:
    """The smallest and the largest `_ratio` of a kind of row; "" where one is untimed."""
    providers = [row["providers"] for row in rows if (row["what"], row["dtype"]) == (what, dtype)]
    if not all("median" in p[base] for p in providers):
        return ""
    speedups = [p[base]["median"] / p["ours"]["median"] for p in providers]
    unsure = "~" if any("~" in _ratio(p, base) for p in providers) else ""
    return f"{unsure}{min(speedups):.1f} – {max(speedups):.1f}×"


def _photos(result: dict, photos: list[Image.Image]) -> str:
    figures = []
    for image, photo in zip(result["images"], photos, strict=True):
        best = image["top5"][0]["probability"]
        rows = "".join(
            f'<li title="{escape(c["label"])}"><i style="width:{100 * c["probability"] / best:.1f}%"></i>'
            f"<span>{escape(c['label'])}</span><span>{c['probability']:.1%}</span></li>"
            for c in image["top5"]
        )
        name = escape(image["name"])
        figures.append(
            f'<div class="photo"><img src="{html_page.image_uri(photo)}" alt="{name} as the model sees it">'
            f"<div><b>{name}</b><ol>{rows}</ol></div></div>"
        )
    weights = result["model"]["weights"]
    note = f"Weights: {escape(weights)}."
    if weights.startswith("random"):
        note += " The classes mean nothing then, only their equality does; --checkpoint FILE gives real ones."
    dtype = result["verification"][0]["dtype"]
    return (
        f'<section><h2>Photos and their top 5</h2><p class="soft">By our model in {dtype}, on the crop '
        f'that is shown. {note}</p><div class="photos">{"".join(figures)}</div></section>'
    )


def _verification(rows: list[dict]) -> str:
    body = []
    for r in rows:
        verdict = {
            None: "",
            True: '<span class="verdict good">ok</span>',
            False: '<span class="verdict bad">no</span>',
        }
        numbers = "".join(f'<td class="num">{c}</td>' for c in _error_cells(r))
        body.append(
            f"<tr><td>{r['dtype']}</td><td>{r['layout']}</td><td>{PROVIDERS[r['implementation']]}</td>{numbers}"
            f"<td>{verdict[r['passed']]}</td></tr>"
        )
    heads = ("relative L2", "allowed", "max", "allowed", "top-1", "top-5")
    head = "<th>dtype</th><th>layout</th><th>model</th>" + "".join(f'<th class="num">{h}</th>' for h in heads)
    return (
        "<section><h2>Logits against float64</h2>"
        '<p class="soft">Errors of the logits against timm\'s model in float64 from the same rounded weights '
        "and pixels. Ours may be 1.5 times that of timm's eager modules in the same dtype and layout, plus "
        "rounding. Top-1 and top-5: share of float64's classes; in half precision near ties may swap.</p>"
        f'<div class="scroll"><table><tr>{head}<th></th></tr>{"".join(body)}</table></div></section>'
    )


def _charts(result: dict) -> str:
    rows = result["timing"]
    legend = "".join(
        f'<span><i style="background:var(--{k})"></i>{name}</span>' for k, name in PROVIDERS.items()
    )
    parts = [
        "<section><h2>Time, relative to eager</h2>",
        '<p class="soft">Shorter is better. Medians of interleaved rounds in one run, all in channels_last; '
        "the thin line spans the 20th to the 80th percentile. Mixer and MLP are the whole sub-blocks: norm, "
        "pool minus identity or fc1, GELU and fc2, LayerScale, residual.</p>"
        f'<div class="legend">{legend}</div>',
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        parts.append(f"<h3>{dtype}</h3>{_bars([row for row in rows if row['dtype'] == dtype])}")
    parts += [f'<p class="soft small">{escape(note)}</p>' for note in _notes(result)]
    return "".join(parts) + "</section>"


def _bars(rows: list[dict]) -> str:
    """One SVG: a group of bars per row, their length relative to the group's eager median."""
    timed = [{k: t for k, t in row["providers"].items() if "median" in t} for row in rows]
    bases = [providers["eager"]["median"] for providers in timed]
    slowest = max(t["median"] / base for p, base in zip(timed, bases, strict=True) for t in p.values())
    limit = min(max(1.1, 1.1 * slowest), 4.0)  # one slow compiled graph must not squeeze all the rest
    y, marks = 6, []
    for row, providers, base in zip(rows, timed, bases, strict=True):
        batch, *image = row["shape"]
        height = _BAR * len(providers)
        title = f"{_NAMES[row['what']]}, stage {row['stage']}" if row["stage"] else "whole model"
        middle = y + height / 2
        marks.append(f'<text x="0" y="{middle - 3:.0f}" font-weight="600">{title}</text>')
        marks.append(
            f'<text x="0" y="{middle + 13:.0f}" class="soft">{batch} × {" × ".join(map(str, image))}</text>'
        )
        for name, t in providers.items():
            ends = [_LABEL + _PLOT * min(t[k] / base / limit, 1) for k in ("median", "p20", "p80")]
            centre = y + _BAR / 2
            text = f"{_digits(t['median'])} ms"
            if row["what"] == "model":
                text += f" · {_digits(batch / t['median'] * 1e3)} img/s"
            if name != "eager":
                text += f" · {_ratio(providers, 'eager', name)}"
            marks.append(
                f'<rect x="{_LABEL}" y="{y + 1.5}" width="{ends[0] - _LABEL:.1f}" height="{_BAR - 3}" rx="2" '
                f'fill="var(--{name})"><title>{PROVIDERS[name]}: {text}</title></rect>'
                f'<line class="spread" x1="{ends[1]:.1f}" x2="{ends[2]:.1f}" y1="{centre}" y2="{centre}"/>'
                f'<text x="{max(ends[0], ends[2]) + 8:.1f}" y="{centre + 4.5}">{text}</text>'
            )
            y += _BAR
        y += _GAP
    grid = []
    step = 0.5 if limit < 2.5 else 1
    for tick in (step * i for i in range(int(limit / step) + 1)):
        x = _LABEL + _PLOT * tick / limit
        dash = "" if tick == 0 else ' stroke-dasharray="3 4"'
        grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y - 4}"{dash}/>')
        grid.append(f'<text class="soft" x="{x:.1f}" y="{y + 12}" text-anchor="middle">{tick:.0%}</text>')
    width = _LABEL + _PLOT + _VALUE
    label = "Bar chart of times relative to eager"
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {y + 18}" role="img" aria-label="{label}">'
        f"{''.join(grid + marks)}</svg></div>"
    )
