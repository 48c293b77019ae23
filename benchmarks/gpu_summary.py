"""Writes summary.md beside a device's CSV files: what was measured, beside the fastest peer and the limits.

    python -m benchmarks.gpu_summary [--results results/nvidia-h200]

First images per second of whole models and training steps, beside eager and torch.compile. Then one table
per benchmark, a line per case. A cell of ours says how many times faster than the fastest peer it is, and
which fraction of the limit that a copy and a matrix product set in the same run. Peers compute the same
without us; "linear" computes less and is no peer. Then the CUDA kernels with what they take of a
multiprocessor.
"""

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from poolformer_kernels.backends import cpp
from poolformer_kernels.cli.errors import report_errors
from poolformer_kernels.cli.files import write_whole
from poolformer_kernels.cli.kernels import LEGEND, kernels, table

from .facts import commit, device_folder, results_folder
from .rows import LIMITS, RecordedRow, read_results

__all__ = ["benchmark_table", "main", "summary", "throughput_table"]

BENCHMARKS = {
    "pool_mixer": "Token mixer sub-block",
    "mlp": "MLP sub-block",
    "block": "Blocks, stages and what is between them",
    "model": "Whole model",
    "training": "Training step",
}
_CASE = ("direction", "model", "stage", "shape", "dtype", "layout", "batch", "state")


def summary(rows: list[RecordedRow], versions: dict[str, str], kernel_lines: list[str]) -> str:
    """The Markdown of one device's rows, in the order of the files."""
    lines = [f"# {rows[0].device}", "", *(f"- {name}: {version}" for name, version in versions.items())]
    lines += ["", "## Images per second", "", *throughput_table(rows)]
    for benchmark, title in BENCHMARKS.items():
        chosen = [row for row in rows if row.benchmark == benchmark]
        lines += ["", f"## {title}", ""]
        if not chosen:
            lines.append("Not measured.")
            continue
        origins = sorted({f"commit {row.commit}, torch {row.torch}" for row in chosen})
        lines += [f"{'; '.join(origins)}. Times as fast as the fastest peer, fraction of the limit.", ""]
        lines += benchmark_table(chosen)
    return "\n".join([*lines, "", "## CUDA kernels", "", LEGEND, "", "```", *kernel_lines, "```", ""])


def throughput_table(rows: list[RecordedRow]) -> list[str]:
    """Markdown of whole models and training steps: a line per case and provider, the fastest first."""
    lines = []
    for case in _cases([row for row in rows if row.benchmark in ("model", "training")]):
        providers = [row for name, row in case.items() if name not in LIMITS]
        for row in sorted(providers, key=lambda row: row.median_s):
            what = f"{row.model}, {'training' if row.benchmark == 'training' else 'inference'}"
            ratios = [_ratio(row, case[peer]) if peer in case else "-" for peer in ("eager", "compile")]
            cells = [what, row.dtype, str(row.batch), row.provider, f"{row.img_per_s:,.0f}", *ratios]
            lines.append(_line(cells))
    if not lines:
        return ["Not measured."]
    heading = ["model", "dtype", "batch", "provider", "img/s", "times eager", "times compile"]
    return [_line(heading), _line(["---"] * 4 + ["---:"] * 3), *lines]


def benchmark_table(rows: list[RecordedRow]) -> list[str]:
    """A Markdown table of one benchmark; what is the same in every case stands above it."""
    cases = _cases(rows)
    providers = {row.provider: None for row in rows if row.provider not in LIMITS}
    shown = sorted((p for p in providers if not _is_peer(p)), key=lambda p: not p.startswith("ours"))
    labels = [[str(getattr(case["matmul"], name)) for name in _CASE] for case in cases]
    varying = [i for i in range(len(_CASE)) if len({label[i] for label in labels}) > 1]
    same = [f"{name} {labels[0][i]}" for i, name in enumerate(_CASE) if i not in varying and labels[0][i]]
    heading = [*(_CASE[i] for i in varying), "fastest peer", *shown, "copy GB/s", "matmul TFLOP/s"]
    lines = [", ".join(same), "", _line(heading)]
    lines.append(_line(["---"] * len(varying) + ["---:"] * (len(heading) - len(varying))))
    for label, case in zip(labels, cases, strict=True):
        peers = [row for provider, row in case.items() if _is_peer(provider)]
        peer = min(peers, key=lambda row: row.median_s, default=None)
        lines.append(
            _line(
                [
                    *(label[i] or "one block" for i in varying),  # the only case without a stage
                    "-" if peer is None else f"{peer.provider}, {_time(peer)}, {_share(peer)}",
                    *(_cell(case.get(provider), peer) for provider in shown),
                    f"{case['copy'].gb_per_s:,.0f}",
                    f"{case['matmul'].tflop_per_s:.3g}",
                ]
            )
        )
    return lines


def _cases(rows: list[RecordedRow]) -> list[dict[str, RecordedRow]]:
    """By case the providers' rows: a case's limits are its last two."""
    cases: list[dict[str, RecordedRow]] = [{}]
    for row in rows:
        cases[-1][row.provider] = row
        if row.provider == "matmul":
            cases.append({})
    return cases[:-1]


def _is_peer(provider: str) -> bool:
    return not (provider in LIMITS or provider.startswith("ours") or provider.endswith(" linear"))


def _cell(row: RecordedRow | None, peer: RecordedRow | None) -> str:
    if row is None:
        return "-"
    return f"{_time(row) if peer is None else _ratio(row, peer)}, {_share(row)}"


def _ratio(row: RecordedRow, peer: RecordedRow) -> str:
    noisy = any(r.p80_s > 2 * r.p20_s for r in (row, peer))
    return f"{'~' if noisy else ''}{peer.median_s / row.median_s:.2f}×"


def _time(row: RecordedRow) -> str:
    return f"{row.median_s * 1e3:.3g} ms" if row.median_s >= 1e-3 else f"{row.median_s * 1e6:.3g} us"


def _share(row: RecordedRow) -> str:
    return f"{row.fraction:.0%}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions() -> dict[str, str]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    found = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Triton": triton,
        "CUDA of PyTorch": torch.version.cuda or "none",
    }
    if build := cpp.build_info():
        archs = ", ".join(build["cuda_archs"]) or "no architecture"
        found["CUDA of the extension"] = f"{build['cuda_built_with'] or 'none'}, for {archs}"
    return found | {"commit": commit()}


def main(argv: list[str] | None = None) -> int:
    """Write the file; the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu_summary", description=__doc__, formatter_class=raw)
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: those of this machine's GPU")
    args = parser.parse_args(argv)
    folder = args.results
    if folder is None:
        folder = results_folder() / device_folder("cuda")
    text = summary(read_results(folder), _versions(), table(kernels()))
    write_whole(folder / "summary.md", text)
    print(f"written to {folder / 'summary.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(report_errors("gpu_summary", main))
