"""Weights under other code bases' names: what these compute with them, and what is refused."""

import os
import re
import resource
from collections import OrderedDict

import pytest
import torch
from support.metaformer import on_meta, tiny, twin
from support.peers import official_model, randomise, relative_error, require
from support.problems import randn
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.cli import export as command
from poolformer_kernels.cli.main import main
from poolformer_kernels.models import HEADS, ModelConfig, PoolFormer, PoolFormerV2, model_config
from poolformer_kernels.models.export import TARGETS

CLASSES = 7
LAYERS, DIMS = (1, 2, 3, 1), (16, 24, 40, 48)
NAMES = pk.list_models("poolformer_*")
NAMES_V2 = pk.list_models("poolformerv2_*")
METAFORMERS = pk.list_models("metaformer_*")
X = randn(2, 3, 48, 64)


def sized(names):
    """The larger models are long."""
    large = ("s36", "m36", "m48")
    return [pytest.param(n, marks=pytest.mark.long) if n.endswith(large) else n for n in names]


def randomised(model):
    """Random weights under which an exchange of any two parameters changes the logits."""
    for name, p in randomise(model).named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif "res_scale" in name or name.endswith("act.scale"):
            torch.nn.init.normal_(p, 0.9, 0.1)
    return model.eval()


def ours(name, head=None, num_classes=CLASSES, in_chans=3, features_only=False):
    """A model by name, or a small one of a family's own sizes."""
    torch.manual_seed(0)
    if name not in ("PoolFormer", "PoolFormerV2"):
        model = pk.create_model(name, num_classes, in_chans, head, features_only=features_only)
        return randomised(model)
    made = {"PoolFormer": PoolFormer, "PoolFormerV2": PoolFormerV2}[name]
    scale = 1e-5 if name == "PoolFormer" else None
    options = {} if head is None else {"head": head}
    config = ModelConfig("small", LAYERS, DIMS, scale, 0.1, None, 1.0)
    return randomised(made(config, num_classes, in_chans, features_only=features_only, **options))


def in_timm(name, weights, num_classes=CLASSES, in_chans=3):
    """timm's model with the exported weights, every one of them and no other."""
    timm = require("timm", "models.metaformer")
    options = {"num_classes": num_classes, "in_chans": in_chans}
    if name in ("PoolFormer", "PoolFormerV2"):
        module, nn = timm.models.metaformer, torch.nn
        options |= {"depths": LAYERS, "dims": DIMS, "use_mlp_head": False}
        options["norm_layers"] = module.GroupNorm1NoBias
        if name == "PoolFormer":
            options |= {"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True}
            options |= {"norm_layers": module.GroupNorm1, "layer_scale_init_values": 1e-5}
            options |= {"res_scale_init_values": None}
        model = module.MetaFormer(**options)
    else:
        model = timm.create_model(name, **options)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def in_transformers(name, weights, num_classes=CLASSES, in_chans=3):
    """transformers' model with the exported weights, every one of them and no other, as x -> logits."""
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    layers, dims = (LAYERS, DIMS) if name == "PoolFormer" else sizes(name)
    config = transformers.PoolFormerConfig(
        depths=list(layers), hidden_sizes=list(dims), num_labels=num_classes, num_channels=in_chans
    )
    model = transformers.PoolFormerForImageClassification(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def sizes(name):
    config = model_config(name)
    return config.layers, config.dims


def logits(model, x):
    with torch.inference_mode():
        y = model(x)
    return getattr(y, "logits", y)


def assert_same_logits(model, theirs, x=X):
    """To rounding in float64, where an exchanged weight would show, and by the error rule in float32."""
    there, here = logits(theirs, x), logits(model, x)
    exact, exact_here = logits(theirs.double(), x.double()), logits(model.double(), x.double())
    assert relative_error(exact_here, exact) < 1e-12
    assert_close_to_fp64(here, there, exact)


class Official(torch.nn.Module):
    """The official model as functions of its state dict."""

    def __init__(self, weights, layers) -> None:
        super().__init__()
        self.weights, self.layers = weights, layers

    def double(self):
        return Official({key: value.double() for key, value in self.weights.items()}, self.layers)

    def forward(self, x):
        return official_model(self.weights, x, self.layers)[1]


# ---- the same logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PoolFormer", "PoolFormerV2", "poolformer_s12", "poolformerv2_s12"])
def test_timm_computes_the_same_logits(name):
    model = ours(name, head="timm")
    weights = pk.export_state_dict(model.state_dict(), "timm")
    assert_same_logits(model, in_timm(name, weights))


@pytest.mark.parametrize("name", ["PoolFormer", "poolformer_s12"])
def test_transformers_computes_the_same_logits(name):
    model = ours(name, head="official")
    weights = pk.export_state_dict(model.state_dict(), "transformers")
    assert_same_logits(model, in_transformers(name, weights))


@pytest.mark.parametrize("source", ["timm", "transformers", "mmpretrain"])
def test_the_official_code_computes_the_same_logits(source):
    """Of a file that came from elsewhere."""
    model = ours("poolformer_s12", head="official")
    state = plain(model)
    if source == "mmpretrain":
        given = {re.sub(r"^(patch_embed|network)\.", r"backbone.\1.", key): t for key, t in state.items()}
        given = {re.sub(r"^norm\.", "backbone.norm6.", key): t for key, t in given.items()}
        given = {re.sub(r"^head\.", "head.fc.", key): t for key, t in given.items()}
    else:
        given = pk.export_state_dict(state, source)
    assert not set(given) & {"patch_embed.proj.weight", "network.0.0.norm1.weight"}
    weights = pk.export_state_dict(given, "official")
    assert list(weights) == list(state)
    assert_same_logits(model, Official(weights, model.config.layers))


@pytest.mark.parametrize(
    ("to", "other_head", "same_head"),
    [("timm", "official", "timm"), ("transformers", "timm", "official"), ("official", "timm", "official")],
)
def test_the_other_head_gives_other_logits(to, other_head, same_head):
    """What the command says of the heads."""
    model = ours("PoolFormer", head=other_head)
    weights = pk.export_state_dict(model.state_dict(), to)
    if to == "official":
        theirs = Official(weights, LAYERS)
    else:
        theirs = {"timm": in_timm, "transformers": in_transformers}[to]("PoolFormer", weights)
    assert relative_error(logits(model, X), logits(theirs, X)) > 0.01
    model.head_mode = same_head
    assert relative_error(logits(model, X), logits(theirs, X)) < 1e-5


@pytest.mark.parametrize(("num_classes", "in_chans"), [(0, 3), (3, 1)])
def test_other_classes_and_channels(num_classes, in_chans):
    x = X[:, :in_chans]
    for to, load in (("timm", in_timm), ("transformers", in_transformers)):
        head = "timm" if to == "timm" else "official"
        model = ours("PoolFormer", head, num_classes, in_chans)
        weights = pk.export_state_dict(model.state_dict(), to)
        assert_same_logits(model, load("PoolFormer", weights, num_classes, in_chans), x)


def test_a_backbones_maps_are_the_same():
    timm = require("timm")
    model = ours("poolformer_s12", features_only=True)
    state = {key: t for key, t in model.state_dict().items() if not re.match(r"norm\d", key)}
    weights = pk.export_state_dict(state, "timm")
    theirs = timm.create_model("poolformer_s12", num_classes=0)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.norm.weight", "head.norm.bias"], [])
    with torch.inference_mode():
        expected = model.double().forward_features(X.double())
        assert relative_error(theirs.eval().double().forward_features(X.double()), expected) < 1e-12


# ---- every model -------------------------------------------------------------------------------------------


def plain(model):
    """The state dict without our notes, as another code base saves it."""
    return OrderedDict(model.state_dict().items())


def shapes(state):
    return {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("name", sized(NAMES + NAMES_V2))
def test_every_model_has_timms_names_and_returns(name):
    timm = require("timm")
    state = plain(on_meta(name))
    there = pk.export_state_dict(state, "timm")
    with torch.device("meta"):
        assert shapes(there) == shapes(timm.create_model(name).state_dict())
    assert_identical(pk.export_state_dict(there, "official"), state)
    assert_identical(pk.convert_state_dict(there), state)
    assert_identical(pk.export_state_dict(there, "timm", name), there)


@pytest.mark.parametrize("name", sized(NAMES))
def test_every_model_has_transformers_names_and_returns(name):
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    state = plain(on_meta(name))
    there = pk.export_state_dict(state, "transformers")
    layers, dims = sizes(name)
    config = transformers.PoolFormerConfig(depths=layers, hidden_sizes=dims, num_labels=1000)
    with torch.device("meta"):
        theirs = transformers.PoolFormerForImageClassification(config).state_dict()
    assert shapes(there) == shapes(theirs)
    assert_identical(pk.export_state_dict(there, "official"), state)
    assert_identical(pk.export_state_dict(pk.export_state_dict(there, "timm"), "transformers"), there)


@pytest.mark.parametrize("name", sized(pk.list_models()))
def test_every_model_keeps_its_official_names(name):
    model = on_meta(name)
    state = model.state_dict()
    assert_identical(pk.export_state_dict(state, "official"), state)
    assert_identical(pk.export_state_dict(state, "official", name), state)
    unnoted = plain(model)
    assert_identical(pk.export_state_dict(unnoted, "official", name), unnoted)


def assert_identical(actual, expected):
    """The same tensors themselves, none copied, under the same names in the same order."""
    assert list(actual) == list(expected)
    for key, value in actual.items():
        assert value is expected[key], key


def test_wrappers_and_prefixes_go():
    state = plain(on_meta("poolformer_s12"))
    wrapped = {"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}}
    assert_identical(pk.export_state_dict(wrapped, "official"), state)
    assert_identical(pk.export_state_dict(wrapped, "timm"), pk.export_state_dict(state, "timm"))


# ---- what a target does not have ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("name", METAFORMERS)
def test_metaformers_are_refused(name, to):
    """Known by their name, or by what our models note; among them those with the names of a PoolFormer."""
    families = "PoolFormer and PoolFormerV2" if to == "timm" else "PoolFormer"
    model = on_meta(name)
    with pytest.raises(ValueError, match=rf"{to} has no {name}; allowed: models of {families}$"):
        pk.export_state_dict(plain(model), to, name)
    mixers = set(model.config.token_mixers)
    mixers = mixers.pop() if len(mixers) == 1 else "/".join(model.config.token_mixers)
    with pytest.raises(ValueError, match=rf"{to} has no MetaFormer with token_mixers={mixers}"):
        pk.export_state_dict(model.state_dict(), to)


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"pool_size": 5}, "pool_size=5"),
        ({"norm_layer": "layer", "act_layer": "relu"}, "norm_layer=layer, act_layer=relu"),
        ({"residual": False}, "residual=False"),
        ({"mlp": False}, "mlp=False"),
        ({"act_layer": torch.nn.Tanh}, "act_layer=Tanh"),
        ({"layer_scale_init": None}, "layer_scale_init=None"),
        ({"token_mixers": "convolution"}, "token_mixers=convolution"),
        ({"norm_layer": "batch"}, "norm_layer=batch"),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "",
)
def test_a_structure_of_ones_own_is_refused_by_name(structure, said, tmp_path):
    model = tiny(**structure)
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "own.pth")  # the file remembers, too
    saved = torch.load(tmp_path / "own.pth", weights_only=True)
    for state in (model.state_dict(), saved, {"state_dict": saved}):
        for to in ("timm", "transformers"):
            with pytest.raises(ValueError, match=rf"{to} has no MetaFormer with {said}; allowed: models of"):
                pk.export_state_dict(state, to)
        weights = pk.export_state_dict(state, "official")
        assert list(weights) == list(model.state_dict())
        with pytest.raises(ValueError, match=rf"not of a poolformer_s12: the model that wrote it has {said}"):
            pk.export_state_dict(state, "official", "poolformer_s12")
    with torch.inference_mode():
        x = randn(1, 3, 40, 56).double()
        expected = model.double()(x)
        if structure != {"layer_scale_init": None}:
            weights = {key: value.double() for key, value in weights.items()}
            assert relative_error(twin(model.config, weights, x)[1], expected) < 1e-12


def test_a_metaformer_like_a_poolformer_is_one():
    model = pk.create_model("poolformer_s12", pool_size=3)
    assert type(model) is not PoolFormer
    state = model.state_dict()
    for to in TARGETS:
        expected = pk.export_state_dict(OrderedDict(state.items()), to)
        assert_identical(pk.export_state_dict(state, to, "poolformer_s12"), expected)


def test_another_poolformer_than_the_named_one():
    state = on_meta("poolformer_s12").state_dict()
    with pytest.raises(ValueError, match=r"not of a metaformer_s12.* has the structure of a PoolFormer"):
        pk.export_state_dict(state, "official", "metaformer_s12")
    with pytest.raises(ValueError, match=r"does not fit poolformer_s24: .* missing keys"):
        pk.export_state_dict(state, "timm", "poolformer_s24")
    with pytest.raises(ValueError, match=r"does not fit poolformerv2_s12: "):
        pk.export_state_dict(state, "timm", "poolformerv2_s12")
    with pytest.raises(ValueError, match=r"name is 'poolformer_s13'; allowed: poolformer_s12, "):
        pk.export_state_dict(state, "timm", "poolformer_s13")


def test_poolformer_v2_is_not_in_transformers():
    state = on_meta("poolformerv2_s12").state_dict()
    with pytest.raises(ValueError, match=r"transformers has no poolformerv2_s12; allowed: models of PoolF"):
        pk.export_state_dict(state, "transformers")


def test_a_dense_backbone_has_norms_that_only_the_official_code_has():
    state = on_meta("poolformer_s12", features_only=True).state_dict()
    assert_identical(pk.export_state_dict(state, "official"), state)
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=rf"{to} has no place for norm0.weight"):
            pk.export_state_dict(state, to)


def test_timm_has_no_downsample_between_stages_of_the_same_width():
    timm = require("timm", "models.metaformer")
    config = ModelConfig("flat", (1, 1, 1, 1), (16, 16, 32, 48), 1e-5, 0.0, None, 1.0)
    state = PoolFormer(config, CLASSES).state_dict()
    with pytest.raises(ValueError, match=r"no downsample .* equally many channels; these are 16, 16, 32, 48"):
        pk.export_state_dict(state, "timm")
    theirs = timm.models.metaformer.MetaFormer(depths=config.layers, dims=config.dims)
    assert type(theirs.stages[1].downsample) is torch.nn.Identity
    assert "poolformer.encoder.patch_embeddings.1.projection.weight" in pk.export_state_dict(
        state, "transformers"
    )


def damaged(drop=(), add=(), **reshape):
    state = plain(on_meta("poolformer_s12"))
    for key in drop:
        del state[key]
    for key in add:
        state[key] = torch.zeros(3)
    for key, shape in reshape.items():
        state[key.replace("__", ".")] = torch.zeros(shape)
    return state


def caformer():
    with torch.device("meta"):
        return require("timm").create_model("caformer_s18").state_dict()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: damaged(drop=["network.0.1.norm2.bias"]),
            "1 missing keys, the first network.0.1.norm2.bias",
        ),
        (lambda: damaged(add=["momentum"]), "1 unexpected keys, the first momentum"),
        (lambda: damaged(drop=["head.weight"]), "1 missing keys, the first head.weight"),
        (lambda: damaged(drop=["norm.weight"]), "1 missing keys, the first norm.weight"),
        (
            lambda: damaged(drop=["network.3.proj.weight"]),
            "it has no network.3.proj.weight; a MetaFormer mus",
        ),
        (lambda: damaged(network__0__0__norm1__weight=(3,)), r"norm1.weight: \[3\] in the file, \[64\] in"),
        (lambda: damaged(patch_embed__proj__weight=(64, 3)), "must be the weight of a convolution, .*64, 3"),
        (lambda: damaged(head__weight=()), "of another shape, the first head.weight"),
        (lambda: damaged(head__weight=(0, 512)), "of another shape, the first head.weight"),
        (lambda: damaged(head__weight=(1000, 4)), r"head.weight: \[1000, 4\] in the file, \[1000, 512\]"),
        (lambda: plain(on_meta("metaformer_ppaa_s12_224")), "not of a PoolFormer: .*; a MetaFormer must be"),
        (
            lambda: plain(on_meta("metaformer_ppff_s12_224")),
            "unexpected keys, .*; a MetaFormer must be named",
        ),
        (caformer, "PoolFormerV2 of 3, 3, 9, 3 blocks and 64, 128, 320, 512 channels: .*token_mixer"),
        (lambda: {"conv1.weight": torch.zeros(3)}, "not a PoolFormer checkpoint: its first key"),
        (dict, "not a PoolFormer checkpoint: it is empty"),
    ],
)
def test_weights_of_no_whole_model_are_refused(make, words, to):
    with pytest.raises(ValueError, match=words):
        pk.export_state_dict(make(), to)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"to is 'keras'; allowed: official, timm, transformers"):
        pk.export_state_dict({}, "keras")
    for content in ([1, 2], {"epoch": 3}, {3: torch.zeros(1)}):
        with pytest.raises(TypeError, match=r"state_dict must"):
            pk.export_state_dict(content, "timm")


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A small PoolFormer's weights as the official code saves them."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "small.pth.tar"
    torch.save({"state_dict": plain(ours("PoolFormer"))}, path)
    return path


def run_export(capsys, file, to, out, *options, code=0):
    """The printed text, or the error's line after the program's name."""
    assert main(["export", str(file), "--to", to, "--out", str(out), *options]) == code
    captured = capsys.readouterr()
    if code == 0:
        assert captured.err == ""
        return captured.out
    assert captured.out == ""
    assert captured.err.startswith("poolformer-kernels: error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err.removeprefix("poolformer-kernels: error: ").rstrip("\n")


def read(path):
    if path.suffix == ".safetensors":
        return require("safetensors.torch").load_file(path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("to", TARGETS)
def test_the_file_has_every_weight(to, suffix, file, tmp_path, capsys):
    if suffix == ".safetensors":
        require("safetensors")
    out = tmp_path / f"out{suffix}"
    text = run_export(capsys, file, to, out)
    expected = pk.export_state_dict(torch.load(file, weights_only=True), to)
    assert f"{out}: {len(expected)} tensors, for " in text
    written = read(out)
    assert set(written) == set(expected)
    for key, value in written.items():
        assert torch.equal(value, expected[key]), key
    assert os.listdir(tmp_path) == ["in", out.name] or os.listdir(tmp_path) == [out.name, "in"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_transformers_reads_the_file_by_itself(tmp_path, capsys):
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    require("safetensors")
    model = ours("PoolFormer", head="official")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    run_export(capsys, tmp_path / "own.pth", "transformers", tmp_path / "model.safetensors")
    config = transformers.PoolFormerConfig(depths=list(LAYERS), hidden_sizes=list(DIMS), num_labels=CLASSES)
    config.save_pretrained(tmp_path)
    theirs = transformers.PoolFormerForImageClassification.from_pretrained(tmp_path).eval()
    assert_same_logits(model, theirs)


def test_timm_reads_the_file_by_itself(tmp_path, capsys):
    timm = require("timm")
    require("safetensors")
    model = ours("poolformer_s12", head="timm")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    text = run_export(capsys, tmp_path / "own.pth", "timm", tmp_path / "model.safetensors")
    assert 'for timm.create_model("poolformer_s12", num_classes=7)\n' in text
    theirs = timm.create_model(
        "poolformer_s12", num_classes=CLASSES, checkpoint_path=str(tmp_path / "model.safetensors")
    )
    assert_same_logits(model, theirs.eval())


def test_memory_that_weights_share_is_written_once_each(tmp_path):
    """A view of a large tensor, two names for one memory, and strides: as safetensors would refuse them."""
    require("safetensors")
    large = torch.randn(1000, 1000)
    tensors = {"a": large[:2, :3], "b": large[:2, :3], "c": large[:5, :4].t()}
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"out{suffix}"
        command.write(path, tensors)
        assert path.stat().st_size < 4000
        for key, value in read(path).items():
            assert torch.equal(value, tensors[key])


# ---- what it says ------------------------------------------------------------------------------------------

OFFICIAL, TIMM = "GroupNorm, then the mean over pixels.", "the mean over pixels, then LayerNorm."
SAME = "The logits stay the same, up to rounding."


def differ(mode):
    ours = f'(our models compute both: head="{mode}" as in this file)'
    return f" The logits there differ from those of this file {ours}."


OTHER = 'evaluates the same weights the other way, "{}": {}'


def head_line(text):
    (line,) = (line for line in text.splitlines() if line.startswith("head"))
    return line.removeprefix("head     ")


@pytest.mark.parametrize("noted", HEADS)
@pytest.mark.parametrize(
    ("to", "name", "its_head"),
    [
        ("timm", "timm", "timm"),
        ("transformers", "transformers", "official"),
        ("official", "The official code", "official"),
    ],
)
def test_it_says_what_the_heads_do_to_the_logits(to, name, its_head, noted, tmp_path, capsys):
    torch.save(ours("PoolFormer", head=noted).state_dict(), tmp_path / "own.pth")
    text = run_export(capsys, tmp_path / "own.pth", to, tmp_path / "out.pth")
    heads = {"official": OFFICIAL, "timm": TIMM}
    known = f'noted in the file as "{noted}": {heads[noted]} '
    if noted == its_head:
        assert head_line(text) == f"{known}{name} does the same. {SAME}"
    else:
        other = OTHER.format(its_head, heads[its_head])
        assert head_line(text) == f"{known}{name} {other}{differ(noted)}"
    assert "Another token mixer" not in text  # the file says what it is


def test_it_says_which_head_names_stand_for(file, tmp_path, capsys):
    text = run_export(capsys, file, "timm", tmp_path / "timm.pth")
    known = f'not noted in the file, so that of the official code, "official": {OFFICIAL} '
    assert head_line(text) == f"{known}timm {OTHER.format('timm', TIMM)}{differ('official')}"
    text = run_export(capsys, tmp_path / "timm.pth", "transformers", tmp_path / "transformers.pth")
    known = f'not noted in the file, so that of timm, "timm": {TIMM} '
    assert head_line(text) == f"{known}transformers {OTHER.format('official', OFFICIAL)}{differ('timm')}"
    text = run_export(capsys, tmp_path / "transformers.pth", "official", tmp_path / "official.pth")
    known = f'not noted in the file, so that of transformers, "official": {OFFICIAL} '
    assert head_line(text) == f"{known}The official code does the same. {SAME}"


def test_it_says_what_the_weights_are_of(file, tmp_path, capsys):
    text = run_export(capsys, file, "transformers", tmp_path / "out.pth")
    small = "a PoolFormer of 1, 2, 3, 1 blocks and 16, 24, 40, 48 channels"
    assert f"read     {file}: {small}, 3 input channels, 7 classes, under the names of the official" in text
    assert "Another token mixer without weights, pool size, norm or activation would have the same" in text
    config = "depths=[1, 2, 3, 1], hidden_sizes=[16, 24, 40, 48], num_labels=7"
    assert f"for PoolFormerForImageClassification(PoolFormerConfig({config}))\n" in text
    text = run_export(capsys, tmp_path / "out.pth", "timm", tmp_path / "timm.bin")
    assert "Another token mixer" not in text  # transformers has one
    assert "MetaFormer with depths=(1, 2, 3, 1), dims=(16, 24, 40, 48), num_classes=7 and the opt" in text


@pytest.mark.parametrize(
    ("name", "options", "to", "words"),
    [
        ("poolformerv2_s12", (), "timm", ('timm.create_model("poolformerv2_s12", num_classes=7)', "one way")),
        ("poolformerv2_s12", (), "official", ("sail-sg/metaformer, has other names", "one way only", SAME)),
        ("metaformer_id_s12", (), "official", ("MetaFormer with token_mixers=identity", "the final norm")),
        (
            "metaformer_id_s12",
            ("--model", "metaformer_id_s12"),
            "official",
            ("this package's metaformer_id",),
        ),
        ("poolformer_s12", (), "official", ("sail-sg/poolformer's poolformer_s12 with num_classes=7",)),
    ],
)
def test_it_says_it_of_every_family(name, options, to, words, tmp_path, capsys):
    torch.save(ours(name).state_dict(), tmp_path / "own.pth")
    text = run_export(capsys, tmp_path / "own.pth", to, tmp_path / "out.pth", *options)
    for word in words:
        assert word in text
    assert ("GroupNorm" in text) == (name == "poolformer_s12")


def test_it_says_that_a_backbone_has_no_head(file, tmp_path, capsys):
    state = torch.load(file, weights_only=True)["state_dict"]
    state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    torch.save(state, tmp_path / "backbone.pth")
    text = run_export(capsys, tmp_path / "backbone.pth", "timm", tmp_path / "out.pth")
    assert head_line(text) == "none: the weights are those of a backbone."
    assert "neither a final norm nor a classifier: load with strict=False" in text


def test_a_file_without_notes_must_name_its_metaformer(tmp_path, capsys):
    """metaformer_s12's names are those of poolformer_s12: only the name keeps it from being taken for one."""
    torch.save(plain(ours("metaformer_s12")), tmp_path / "in.pth")
    text = run_export(capsys, tmp_path / "in.pth", "timm", tmp_path / "out.pth")
    assert "Another token mixer without weights" in text
    options = ("--model", "metaformer_s12", "--force")
    error = run_export(capsys, tmp_path / "in.pth", "timm", tmp_path / "out.pth", *options, code=2)
    file = tmp_path / "in.pth"
    assert error.startswith(f"checkpoint {file}: timm has no metaformer_s12; allowed: models of PoolFormer")


# ---- requests that cannot be met ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist or is not a file"),
        (b"not a checkpoint", "cannot be read as tensors only"),
        ([1, 2], "state_dict must be a mapping of names to tensors, got list"),
        ({"conv1.weight": torch.zeros(3)}, "not a PoolFormer checkpoint: its first key is 'conv1.weight'"),
    ],
    ids=["missing", "text", "list", "keys"],
)
def test_a_wrong_file(content, words, tmp_path, capsys):
    path = tmp_path / "in.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    error = run_export(capsys, path, "timm", tmp_path / "out.pth", code=2)
    assert error.startswith(f"checkpoint {path}")
    assert error.count(str(path)) == 1
    assert words in error
    assert not (tmp_path / "out.pth").exists()


def test_transformers_has_no_other_family(tmp_path, capsys):
    torch.save(ours("PoolFormerV2").state_dict(), tmp_path / "in.pth")
    error = run_export(capsys, tmp_path / "in.pth", "transformers", tmp_path / "out.pth", code=2)
    path = tmp_path / "in.pth"
    assert error == f"checkpoint {path}: transformers has no PoolFormerV2; allowed: models of PoolFormer"


@pytest.mark.parametrize("suffix", ["", ".tar", ".onnx", ".pth.gz"])
def test_another_suffix(suffix, file, tmp_path, capsys):
    out = tmp_path / f"out{suffix}"
    error = run_export(capsys, file, "timm", out, code=2)
    last = "." + suffix.rpartition(".")[2] if suffix else ""
    assert error == f"--out {out}: the suffix is {last!r}; allowed: .safetensors, .pth, .pt, .bin"


def test_an_existing_file_is_kept_unless_forced(file, tmp_path, capsys):
    out = tmp_path / "out.pth"
    out.write_text("precious")
    error = run_export(capsys, file, "timm", out, code=2)
    assert error == f"--out {out} exists; allowed: a new file, or --force to overwrite it"
    assert out.read_text() == "precious"
    run_export(capsys, file, "timm", out, "--force")
    assert "stem.conv.weight" in read(out)
    run_export(capsys, out, "official", out, "--force")  # the file itself
    assert "patch_embed.proj.weight" in read(out)


def test_places_that_cannot_be_written(file, tmp_path, capsys):
    (tmp_path / "folder.pth").mkdir()
    error = run_export(capsys, file, "timm", tmp_path / "folder.pth", "--force", code=2)
    assert error == f"--out {tmp_path / 'folder.pth'} is a folder; allowed: a file"
    out = tmp_path / "none" / "new" / "out.pth"
    error = run_export(capsys, file, "timm", out, code=2)
    reason = f"there is no folder {out.parent.parent}; only the last folder of a path is made"
    assert error == f"cannot write to {out}: {reason}"
    assert not out.parent.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o.pth"], "the following arguments are required: --to"),
        (["--to", "timm"], "the following arguments are required: --out"),
        (["--to", "keras", "--out", "o.pth"], "argument --to: invalid choice: 'keras'"),
        (
            ["--to", "timm", "--out", "o.pth", "--model", "s13"],
            "--model: 's13' is no model",
        ),
    ],
)
def test_usage_errors(arguments, message, file, capsys):
    assert main(["export", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_safetensors(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.sys.modules, "safetensors.torch", None)
    error = run_export(capsys, file, "timm", tmp_path / "out.safetensors", code=2)
    assert "pip install safetensors" in error


# ---- a file that is complete, or none ----------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """No file grows beyond 64 KiB: the write ends in the middle, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_a_write_that_failed(exists, suffix, file, tmp_path, capsys, small_disk):
    if suffix == ".safetensors":
        require("safetensors")
    out = tmp_path / f"out{suffix}"
    if exists:
        out.write_text("precious")
    before = sorted(os.listdir(tmp_path))
    error = run_export(capsys, file, "timm", out, *(["--force"] if exists else []), code=2)
    assert error == f"cannot write to {out}: File too large"
    assert sorted(os.listdir(tmp_path)) == before
    assert not exists or out.read_text() == "precious"


@pytest.mark.parametrize(
    ("where", "raised"),
    [
        ("fsync", OSError(28, "No space left on device")),
        ("fsync", KeyboardInterrupt()),
        ("replace", OSError(5, "I")),
    ],
    ids=["full", "interrupt", "move"],
)
def test_nothing_is_left_whatever_fails(where, raised, file, tmp_path, capsys, monkeypatch):
    sizes = []

    def fail(*args):
        sizes.extend(path.stat().st_size for path in tmp_path.glob(".poolformer-kernels.*"))
        raise raised

    owner = os if where == "fsync" else type(tmp_path)
    monkeypatch.setattr(owner, where, fail)
    before = sorted(os.listdir(tmp_path))
    if isinstance(raised, OSError):
        error = run_export(capsys, file, "timm", tmp_path / "out.pth", code=2)
        assert error == f"cannot write to {tmp_path / 'out.pth'}: {raised.strerror}"
    else:
        assert main(["export", str(file), "--to", "timm", "--out", str(tmp_path / "out.pth")]) == 130
    assert sizes[0] > 10_000  # it was written beside its place
    assert sorted(os.listdir(tmp_path)) == before
