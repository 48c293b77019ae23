"""What `poolformer-kernels train` adds to a step: time, memory, a second process, and loading of images.

    poolformer-kernels bench loop [--models s12] [--batch 8] [--memory-batch 32]

loop     images per second of the training loop (schedule, keyed stochastic depth, checks, rows of
         metrics.csv) on batches that are already decoded, as a share of a step written by hand, of the same
         model on the same batches (with torch's own draws), both interleaved in one process.
memory   a process's peak above what it takes with the model, its gradients and moments, in a step of
         --memory-batch images: our layers' as a share of eager's. A process each.
scaling  images per second of two processes of one thread on --batch images each, as a share of twice one
         process's, in alternating runs; and the bytes of gradients that a step exchanges.
loading  images per second that one worker decodes and augments by the paper's recipe (JPEG, 500 x 375),
         beside what the bare step needs.

Everything under bfloat16 autocast, 224 x 224. The CSV has one row per figure: what, value, unit, and what it
is of.
"""

import argparse
import csv
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.files import check_writable, write_whole
from poolformer_kernels.cli.options import Parser, positive
from poolformer_kernels.profiling import time_interleaved

from .facts import DEFAULT_FOLDER, csv_path, facts_of
from .harness import TIMMS, settle

ALTERNATIONS = 3  # of runs with one process and with two
MEMORY = """
import resource, sys
from pathlib import Path
from poolformer_kernels.benchmarks import bench_loop
from poolformer_kernels.train.processes import peak_memory
name, batch, model, run, threads = sys.argv[1:]
trainer = bench_loop.make_trainer(model, int(batch), Path(run), eager=name == "eager", threads=int(threads))
batches = [bench_loop.decoded(int(batch), trainer)]
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before += 3 * bench_loop.gradient_bytes(model)  # and two moments: they come with the first step
for _ in range(3):
    trainer._one_step(batches)
print(peak_memory(trainer.device) - before)
"""


def make_trainer(
    model: str,
    batch: int,
    run: Path,
    *,
    eager: bool = False,
    threads: int,
    log_every: int = 50,
):
    """A run of the paper's recipe on images that are never read."""
    from poolformer_kernels.train import loop
    from poolformer_kernels.train.data import Data, Images
    from poolformer_kernels.train.processes import Processes
    from poolformer_kernels.train.recipe import resolve

    torch.set_num_threads(threads)
    changes = {"model": model, "batch_size": batch, "workers": 0, "eager": eager, "head": "timm"}
    recipe = resolve("paper", changes, {"log_every": log_every, "precision": "bfloat16"})
    images = Images([None] * (batch * 1000))
    data = Data("none", images, images, [str(i) for i in range(1000)])
    processes = Processes(0, 1, torch.device("cpu"))
    recipe = loop.check(recipe, data, run, False, processes)
    trainer = loop._Trainer(recipe, data, run, processes, loop._Signals(torchrun=False), show=False)
    trainer.open()
    return trainer


def decoded(batch: int, trainer) -> object:
    """A batch of random images with soft targets."""
    from poolformer_kernels.train.data import Batch

    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    targets = torch.rand(batch, 1000, generator=generator).softmax(1)
    return Batch(images, targets, trainer.step, list(range(batch)))


def bare_step(trainer, batch) -> Callable[[], None]:
    """The same model's step as one would write it by hand."""
    from timm.loss import SoftTargetCrossEntropy

    loss_of, model, optimizer = SoftTargetCrossEntropy(), trainer.model, trainer.optimizer
    x = batch.images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = loss_of(model(x).float(), batch.targets)
        loss.backward()
        optimizer.step()

    return step


def measure_loop(args: argparse.Namespace, run: Path) -> tuple[float, float]:
    """(images per second of the loop, of bare steps)."""
    from poolformer_kernels.train.report import TensorBoard

    trainer = make_trainer(args.model, args.batch, run, threads=args.threads, log_every=5)
    trainer.board, trainer.progress = TensorBoard(run), _Silent()
    batch = decoded(args.batch, trainer)
    plain = make_trainer(args.model, args.batch, run.with_name("bare"), threads=args.threads)
    for module in plain.depth.modules:
        module.draws = None  # drawn by torch's own generator
    bare = bare_step(plain, batch)

    def loop() -> None:  # what `run_steps` does with a step
        trainer.set_rate(trainer.step)
        trainer._one_step([batch])
        if trainer.step % trainer.recipe.log_every == 0:
            trainer._settle()
            trainer._row({})
        trainer._agreed_signal()

    times = time_interleaved({"loop": loop, "bare": bare}, rounds=args.rounds)
    return args.batch / times["loop"].median, args.batch / times["bare"].median


class _Silent:
    def update(self, *_) -> None:
        pass


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Bytes of the peak, of our layers and of eager's."""
    peaks = {}
    folder.mkdir()
    for name in ("ours", "eager"):
        run = str(folder / name)
        words = [name, str(args.memory_batch), args.model, run, str(args.threads)]
        peaks[name] = float(_python("-c", f"{_IMPORT}{MEMORY}", *words).split()[-1])
    return peaks


_IMPORT = "from poolformer_kernels.cli.main import load_benchmarks; load_benchmarks()\n"


def measure_scaling(args: argparse.Namespace, folder: Path) -> tuple[list[float], list[float], int]:
    """(images per second of one process and of two, in alternating runs; bytes of gradients)."""
    data = jpegs(folder / "data", 48, side=(224, 224))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for i in range(ALTERNATIONS):
        for processes in (1, 2):
            run = folder / f"{processes}_{i}"
            words = ["train", str(data), "--out", str(run), "--model", args.model, "--device", "cpu"]
            words += ["--batch-size", str(args.batch * processes), "--log-every", "1", "--workers", "0"]
            words += ["--epochs", "3", "--warmup-epochs", "1", "--cooldown-epochs", "0", "--mixup", "0"]
            words += ["--cutmix", "0", "--auto-augment", "none", "--random-erasing", "0"]
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            _python(*launcher, "-m", pk.__name__, *words, threads=1)
            with (run / "metrics.csv").open() as file:
                found = [float(row["images_per_second"]) for row in csv.DictReader(file)]
            rates[processes].append(statistics.median(found))
    return rates[1], rates[2], gradient_bytes(args.model)


def gradient_bytes(model: str) -> int:
    return sum(p.numel() * 4 for p in pk.create_model(model).parameters() if p.requires_grad)


def measure_loading(folder: Path) -> float:
    """Images per second of one worker."""
    import time

    from poolformer_kernels.train.data import ImageNorm, open_data, train_loader
    from poolformer_kernels.train.recipe import resolve

    data = open_data(str(jpegs(folder, 64, side=(500, 375))))
    recipe = resolve("paper", {"batch_size": 16, "workers": 1, "epochs": 20})
    norm = ImageNorm(224, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.9)
    batches = iter(train_loader(data, recipe, norm, 0, 1, 0, False))
    for _ in range(4):  # the worker starts, two batches are ahead
        next(batches)
    start = time.perf_counter()
    for _ in range(12):
        next(batches)
    return 12 * 16 / (time.perf_counter() - start)


def jpegs(root: Path, count: int, side: tuple[int, int]) -> Path:
    """Photographs' size and detail: smooth colours with some noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, name in ((s, c) for s in ("train", "val") for c in ("a", "b")):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count // 2 if split == "train" else 2):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize(side, Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = pixels + rng.normal(0, 6, pixels.shape).astype(np.int16)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return root


def _python(*words: str, threads: int | None = None) -> str:
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        raise CommandError(f"a process of the benchmark failed: {last}")
    return done.stdout


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The options."""
    found = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add(
        "--models",
        dest="model",
        type=TIMMS,
        default="poolformer_s12",
        metavar="NAME",
        help="which model (default: %(default)s)",
    )
    add("--batch", type=positive, default=8, metavar="N", help="images of a step (default: %(default)s)")
    add(
        "--memory-batch",
        type=positive,
        default=32,
        metavar="N",
        help="images of the step whose memory is measured (default: %(default)s)",
    )
    add(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        metavar="N",
        help="threads of the CPU (default: torch's own number)",
    )
    add(
        "--rounds", type=positive, default=30, metavar="N", help="rounds of the timing (default: %(default)s)"
    )
    add("--only", choices=("loop", "memory", "scaling", "loading"), help="one of the figures (default: all)")
    add("--csv", metavar="FILE", help=f"where the rows go (default: {DEFAULT_FOLDER}/<device>/loop.csv)")
    return found


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = parser(prog).parse_args(argv)
    path = csv_path("loop", "cpu", args.csv)
    check_writable(str(path))
    settle(args.threads)
    wanted = [args.only] if args.only else ["loop", "memory", "scaling", "loading"]
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bare = None
        if "loop" in wanted or "loading" in wanted:
            loop, bare = measure_loop(args, folder / "loop")
            rows += [("loop", loop, "images/s"), ("bare step", bare, "images/s")]
            rows.append(("loop / bare step", loop / bare, "ratio"))
        if "memory" in wanted:
            peaks = measure_memory(args, folder / "memory")
            rows += [(f"peak above the model, {name}", peak / 1e6, "MB") for name, peak in peaks.items()]
            rows.append(("peak, ours / eager", peaks["ours"] / peaks["eager"], "ratio"))
        if "scaling" in wanted:
            one, two, exchanged = measure_scaling(args, folder / "scaling")
            ratio = statistics.median(b / (2 * a) for a, b in zip(one, two, strict=True))
            rows += [("one process", statistics.median(one), "images/s")]
            rows += [("two processes", statistics.median(two), "images/s"), ("two / ideal", ratio, "ratio")]
            rows.append(("gradients exchanged a step", exchanged, "bytes"))
        if "loading" in wanted:
            loading = measure_loading(folder / "loading")
            rows += [("JPEG loading by one worker", loading, "images/s")]
            rows.append(("one worker / the bare step's need", loading / bare, "ratio"))
    facts = {"model": args.model, "batch": args.batch, "memory_batch": args.memory_batch, **facts_of("cpu")}
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["what", "value", "unit", *facts])
    writer.writerows([what, f"{value:.6g}", unit, *facts.values()] for what, value, unit in rows)
    write_whole(path, text.getvalue())
    for what, value, unit in rows:
        print(f"{what:36} {value:12,.3f} {unit}")
    print(f"written to {path}")
    return 0
