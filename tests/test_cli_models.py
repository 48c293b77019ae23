"""Names of models on the command line: each of `list_models`, whole or short, and what a wrong one gets."""

import argparse
import json

import pytest
from support.commands import printed, refused

import poolformer_kernels as pk
from poolformer_kernels.cli.main import load_benchmark
from poolformer_kernels.cli.options import DIGITS, HEADS, model, models_like_timms, short_names
from poolformer_kernels.cli.parser import parser, subparsers

SHORT = {
    "s12": "poolformer_s12",
    "m48": "poolformer_m48",
    "v2_s24": "poolformerv2_s24",
    "id_s12": "metaformer_id_s12",
    "ppaa_s12_224": "metaformer_ppaa_s12_224",
}


def options(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


COMMANDS = {  # words before a name -> whether it can be of any model
    ("export", "a.pth", "--to", "timm", "--out", "b.pth", "--model"): True,
    ("predict", "a.png", "--checkpoint", "a.pth", "--model"): True,
    ("validate", "data", "--checkpoint", "a.pth", "--model"): True,
    ("cam", "a.png", "--model"): True,
    ("demo", "--model"): False,
    ("profile", "--model"): False,
}


def chosen(words: tuple[str, ...], name: str) -> str:
    value = options(*words, name).model
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize(("words", "every"), COMMANDS.items(), ids=[words[0] for words in COMMANDS])
def test_every_command_knows_every_name(words, every) -> None:
    for name in pk.list_models() if every else pk.list_models("poolformer_*"):
        assert chosen(words, name) == name
    for short, name in SHORT.items():
        if every or name.startswith("poolformer_"):
            assert chosen(words, short) == name


def test_every_command_with_a_model_is_looked_at() -> None:
    commands = subparsers(parser()).items()
    have = {n for n, c in commands if any("--model" in action.option_strings for action in c._actions)}
    assert have == {words[0] for words in COMMANDS}


def test_short_names_are_of_one_model_each_and_none_is_a_whole_name() -> None:
    short = short_names()
    assert len(set(short.values())) == len(short)
    assert not set(short) & set(pk.list_models())
    poolformers = set(pk.list_models("metaformer_[sm][0-9]*"))  # their short names are PoolFormer's
    assert set(pk.list_models()) - set(short.values()) == poolformers


def test_heads_are_those_of_dense_models() -> None:
    dense = pytest.importorskip("poolformer_kernels.dense", exc_type=ImportError)
    assert (*dense.list_detectors(), *dense.list_segmenters()) == HEADS
    parse = model(heads=True, more=(DIGITS,))
    assert parse("retinanet_s12") == "retinanet_poolformer_s12"
    assert parse("mask_rcnn_v2_m36") == "mask_rcnn_poolformerv2_m36"
    assert parse("semantic_fpn_poolformer_digits") == "semantic_fpn_poolformer_digits"
    with pytest.raises(argparse.ArgumentTypeError, match="is no model"):
        model()("retinanet_s12")


def test_digits_are_trainings_own() -> None:
    networks = pytest.importorskip("poolformer_kernels.train.networks", exc_type=ImportError)
    assert networks.DIGITS.name == DIGITS


def test_models_like_timms_are_timms() -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    assert models_like_timms() == [name for name in pk.list_models() if timm.is_model(name)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --model poolformer_s13", "'poolformer_s13' is no model (did you mean poolformer_s"),
        ("export a --to timm --out b --model pppf_s12", "'pppf_s12' is no model (did you mean pppf_s12_224"),
        ("predict a --checkpoint b --model retinanet_s121", "'retinanet_s121' is no model (did you mean ret"),
        ("demo --model zzz", "'zzz' is no model; all of them: poolformer-kernels info --models"),
        ("demo --model metaformer_s12", "metaformer_s12 cannot be taken: timm has none to compare it with; "),
        ("profile --model v2_s12", "poolformerv2_s12 cannot be taken: its layers are not PoolFormer's; "),
        ("cam a.png --model S", "'S' is no model"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_near(words, message, capsys) -> None:
    assert refused(capsys, words).startswith(f"argument --model: {message}")


def test_benchmarks_and_training_take_short_names() -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    from poolformer_kernels.cli.train import add_options

    parsed = {
        name: load_benchmark(name).parser().parse_args(["--models", "s24", "poolformer_m36"]).models
        for name in ("model", "block", "mlp", "pool-mixer", "training", "dense", "host")
    }
    assert all(models == ["poolformer_s24", "poolformer_m36"] for models in parsed.values())
    assert load_benchmark("loop").parser().parse_args(["--models", "v2_s12"]).model == "poolformerv2_s12"
    assert load_benchmark("model").parser().parse_args(["--models", "v2_s12"]).models == ["poolformerv2_s12"]
    for words, name in (([], "ppff_s12_224"), (["--task", "segmentation"], "semantic_fpn_v2_s12")):
        top = parser()
        words = ["train", "data", "--out", "run", *words, "--model", name]
        add_options(subparsers(top)["train"], words)
        head = "semantic_fpn_" if "--task" in words else ""
        assert top.parse_args(words).recipe_model == head + short_names()[name.removeprefix(head)]


def test_a_wrong_model_is_refused_before_photos_are_read(monkeypatch, capsys) -> None:
    """And before anything is imported for them."""
    reached = []
    monkeypatch.setattr("poolformer_kernels.cli.main.require", reached.append)
    for command in ("demo --image none.png", "predict none.png --checkpoint none.pth", "cam none.png"):
        assert "'foo' is no model" in refused(capsys, f"{command} --model foo")
    assert reached == []


def test_info_lists_the_models(capsys) -> None:
    rows = json.loads(printed(capsys, "info --models --json"))
    assert [row["name"] for row in rows] == pk.list_models()
    assert {row["short"]: row["name"] for row in rows if row["short"]} == short_names()
    lines = printed(capsys, "info --models").splitlines()
    assert lines[0].split() == ["poolformer_s12", "s12", "11.9", "M", "parameters"]
    assert len(lines) == len(rows)
