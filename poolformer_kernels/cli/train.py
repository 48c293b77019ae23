"""`poolformer-kernels train` and `validate`: the options, and errors as one line."""

import argparse
import json
import struct
from dataclasses import Field, fields
from pathlib import Path

from ..models import PoolFormer
from ..models.checkpoints import FILE_NOTES
from ..train.data import BadImageError, open_data
from ..train.evaluation import evaluate
from ..train.loop import TASKS, RunError, check_new, train
from ..train.networks import build, image_norm
from ..train.processes import Processes, start
from ..train.recipe import RecipeError, RecipeFields, field_type, read_yaml, resolve
from ..train.state import StateError
from .errors import CommandError
from .files import check_readable
from .options import DIGITS, Parser, model

__all__ = ["add_options", "add_recipe", "run", "validate"]


def add_options(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """The options of `train`: one for every field of the recipe of the task that the words are about."""
    add_recipe(parser, TASKS[_task(words)].kind)


def add_recipe(parser: argparse.ArgumentParser, kind: type[RecipeFields]) -> argparse._ArgumentGroup:
    """The options of one kind of recipe, in a group of their own."""
    group = parser.add_argument_group(
        f"the recipe of --task {kind.task}, with the defaults of --recipe paper"
    )
    for f in fields(kind):
        of, names = field_type(f, kind), f.metadata["allowed"]
        options: dict = {"default": None, "help": _recipe_help(f), "dest": f"recipe_{f.name}"}
        if of is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif of is tuple:
            options |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        else:
            options |= {"type": of, "metavar": None if names else {int: "N", float: "X", str: "NAME"}[of]}
            options["choices"] = names or None
        if f.name == "model":
            options["type"] = model(more=(DIGITS,), heads=kind.task != "classification", timm=True)
        group.add_argument(f"--{f.name.replace('_', '-')}", **options)
    return group


def _recipe_help(f: Field) -> str:
    """What a field is, and its default."""
    text, value = f.metadata["help"], f.default
    if "default:" in text:
        return text
    if isinstance(value, tuple):
        shown = " ".join(f"{number:.4g}" for number in value)
    else:
        shown = {"None": "none", "True": "on", "False": "off"}.get(str(value), value)
    return f"{text} (default: {shown})"


def _task(words: list[str]) -> str:
    """The task: of --task, else of --config or the run that is resumed, else classification."""
    parser = Parser(add_help=False, prog="poolformer-kernels train")
    parser.add_argument("--task", choices=tuple(TASKS))
    parser.add_argument("--config")
    parser.add_argument("--out", default="")
    parser.add_argument("--resume", action="store_true")
    args, _ = parser.parse_known_args(words)
    if args.task is not None:
        return args.task
    try:
        task = _config(args, keep_task=True).get("task", "classification")
    except RecipeError as error:
        raise CommandError(str(error)) from None
    if task not in TASKS:
        raise CommandError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    return task


def run(args: argparse.Namespace) -> int:
    """Trains. The exit code of `poolformer_kernels.train.loop.train`."""
    task = TASKS[_task(args.words)]
    given = {f.name: getattr(args, f"recipe_{f.name}") for f in fields(task.kind)}
    given = {name: value for name, value in given.items() if value is not None}
    processes = None
    try:
        processes = start(args.device, args.timeout)
        preset = args.recipe or ("small" if args.data == task.sample else "paper")
        recipe = resolve(preset, processes.do_first(lambda: _config(args)), given, kind=task.kind)
        processes.do_first(lambda: _check_files(recipe, args))
        for turn in (True, False):  # one process of a machine downloads what is not there yet
            if processes.first_here == turn:
                data = task.open(args.data, recipe)
            processes.sum(0)
        return train(recipe, data, Path(args.out), processes, resume=args.resume)
    except (RecipeError, StateError) as error:
        raise CommandError(str(error)) from None
    except BadImageError as error:
        raise CommandError(
            f"{_last_line(error)}; --bad-images skip puts its neighbour in its place"
        ) from None
    except RunError as error:
        raise CommandError(str(error), code=1) from None
    except OSError as error:  # metrics.csv, curves.png, index.html
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(
            f"cannot go on: {where}{error.strerror or error}; --resume takes up the run"
        ) from None
    except RuntimeError as error:  # a process that loads images was killed, for memory say
        if not str(error).startswith("DataLoader worker"):
            raise
        raise CommandError(f"{error}; --resume takes up the run", code=1) from None
    finally:
        if processes is not None:
            processes.end()


def _check_files(recipe: RecipeFields, args: argparse.Namespace) -> None:
    """What can be known of RUN and the checkpoint before the images are looked for."""
    if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_file():
        raise RecipeError(f"checkpoint {recipe.checkpoint} does not exist or is not a file")
    if not args.resume:
        check_new(Path(args.out))


def _config(args: argparse.Namespace, keep_task: bool = False) -> dict[str, object]:
    """The fields of --config, or of the run that is resumed."""
    own = Path(args.out) / "config.yaml"
    path = args.config or (own if args.resume and own.is_file() else None)
    config = read_yaml(path) if path else {}
    config.pop("data", None)
    if keep_task:
        return config
    task, stored = _task(args.words), config.pop("task", "classification" if path == own else None)
    if stored not in (None, task):
        where = f"--resume: the run in {args.out}" if path == own else f"config {path}"
        raise RecipeError(f"the task is {task}, but {where} is of {stored}")
    return config


def validate(args: argparse.Namespace) -> int:
    """Prints a checkpoint's scores and images per second; 1 where top-1 (AP50, mIoU) is below --at-least."""
    processes = None
    try:
        check_readable("--checkpoint", args.checkpoint)
        processes = start(args.device, 600.0)
        notes = _notes(args.checkpoint)
        task = _task_of(args, notes)
        if task != "classification":
            return _validate_dense(args, task, notes, processes)
        data = open_data(args.data)
        name = args.model or notes.get("model")
        if name is None:
            raise CommandError(
                f"--model: {args.checkpoint} does not say which model it is of; allowed: its name"
            )
        classes = notes.get("classes", data.classes)
        if classes != data.classes:
            raise CommandError(
                f"DATA {args.data} has {len(data.classes)} classes, {data.classes[:3]} …;"
                f" {args.checkpoint} was trained on {len(classes)}, {classes[:3]} …"
            )
        settings = {
            "model": name,
            "checkpoint": args.checkpoint,
            "drop_path": 0.0,
            "precision": args.precision,
        }
        settings |= {k: notes[k] for k in ("image_size", "crop_pct", "interpolation") if k in notes}
        given = {"head": args.head, "image_size": args.image_size}
        settings |= {k: v for k, v in given.items() if v is not None}
        recipe = resolve("small" if name == "poolformer_digits" else "paper", settings)
        model = build(recipe, len(data.classes), new_classifier=False).to(processes.device)
        norm = image_norm(model, recipe)
        found = evaluate(
            model,
            data.val,
            norm,
            recipe.precision,
            processes,
            batch=args.batch_size,
            workers=args.workers,
            skip_bad=args.bad_images == "skip",
        )
    except (RecipeError, StateError) as error:
        raise CommandError(str(error)) from None
    except BadImageError as error:
        raise CommandError(f"{_last_line(error)}; --bad-images skip leaves it out") from None
    finally:
        if processes is not None:
            processes.end()
    low = int(args.at_least is not None and found.top1 < args.at_least)
    if not processes.first:
        return low
    result = {
        "data": args.data,
        "checkpoint": args.checkpoint,
        "model": name,
        "head": model.head_mode if isinstance(model, PoolFormer) else "timm",
        "precision": recipe.precision,
        "image_size": norm.size,
        "crop_pct": norm.crop_pct,
        "interpolation": norm.interpolation,
        "images": found.images,
        "bad_images": found.bad,
        "loss": found.loss,
        "top1": found.top1,
        "top5": found.top5,
        "images_per_second": found.images_per_second,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        scores = f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}"
        print(f"{name} on {found.images} images of {args.data}: {scores}")
        print(f"{found.images_per_second:.0f} images/s at {norm.size} pixels, {recipe.precision}")
    return low


def _task_of(args: argparse.Namespace, notes: dict) -> str:
    """The task that a checkpoint is validated for."""
    noted = notes.get("task", "classification" if notes else None)
    if args.task is not None and noted not in (None, args.task):
        raise CommandError(f"--task is {args.task}; {args.checkpoint} is of {noted}")
    task = args.task or noted or "classification"
    if task not in TASKS:
        raise CommandError(f"{args.checkpoint} is of the task {task!r}; allowed: {', '.join(TASKS)}")
    for option in ("head", "image_size") if task != "classification" else ():
        if (value := getattr(args, option)) is not None:
            raise CommandError(
                f"--{option.replace('_', '-')} is {value}; allowed with classification only, this is {task}"
            )
    return task


def _validate_dense(args: argparse.Namespace, name: str, notes: dict, processes: Processes) -> int:
    """The same for the other tasks: AP, or mIoU and accuracy."""
    task = TASKS[name]
    model = args.model or notes.get("model")
    if model is None:
        raise CommandError(
            f"--model: {args.checkpoint} does not say which model it is of; allowed: its name, such as"
            f" {task.kind.head}_poolformer_s12"
        )
    settings = {"model": model, "checkpoint": args.checkpoint, "precision": args.precision}
    settings |= {"workers": args.workers, "bad_images": args.bad_images}
    if "min_size" in notes:
        settings |= {"min_size": [notes["min_size"]] * 2, "max_size": notes["max_size"]}
    settings |= {n: notes[n] for n in ("scale", "zero_label") if n in notes}
    recipe = resolve("paper", settings, kind=task.kind)
    data = task.open(args.data, recipe)
    classes = notes.get("classes", data.classes)
    if classes != data.classes:
        raise CommandError(
            f"DATA {args.data} has {len(data.classes)} classes, {data.classes[:3]} …;"
            f" {args.checkpoint} was trained on {len(classes)}, {classes[:3]} …"
        )
    evaluated = task(recipe, data, processes)
    evaluated.whole = True
    network = evaluated.build().to(processes.device)
    found = evaluated.evaluate(network, stop=lambda: False)
    low = int(args.at_least is not None and found.values[task.floor] < args.at_least)
    if not processes.first:
        return low
    result = {
        "task": name,
        "data": args.data,
        "checkpoint": args.checkpoint,
        "model": model,
        "precision": args.precision,
        "images": len(data.val) - found.bad,
        "bad_images": found.bad,
        **{column.removeprefix("val_"): value for column, value in found.values.items()},
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return low
    values = {column.removeprefix("val_").replace("_", " "): v for column, v in found.values.items()}
    rate = values.pop("images per second")
    scores = ", ".join(f"{label} {value:.2f}" for label, value in values.items())
    print(f"{model} on {result['images']} images of {args.data}: {scores} (per cent)")
    print(f"{rate:.1f} images/s, {args.precision}")
    return low


def _notes(checkpoint: str) -> dict:
    """What a run wrote into its best.safetensors about it; nothing for other files."""
    if Path(checkpoint).suffix != ".safetensors" or not Path(checkpoint).is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, "pt") as file:
            return json.loads((file.metadata() or {}).get(FILE_NOTES, "{}"))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CommandError(f"--checkpoint {checkpoint}: {error}") from None


def _last_line(error: Exception) -> str:
    """The message itself: a loader's process puts its traceback before it."""
    return str(error).rpartition("BadImageError: ")[2].strip()
