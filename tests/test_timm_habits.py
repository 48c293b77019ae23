"""What timm's users and tools do with a model, on ours and on timm's with the same weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.memory import MALLOC, require_peaks
from support.metaformer import SIZE, tiny
from support.models import raises
from support.peers import randomise, relative_error, require, timm_model, timm_twins
from support.problems import randn
from support.processes import python
from support.rule import assert_close_to_fp64
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.models import FeatureInfo

timm = require("timm")
NAMES = ("poolformer_s12", "poolformerv2_s12")
X = randn(2, 3, 64, 96)
both = pytest.mark.parametrize("name", NAMES)


def backbone(name: str, **options):
    torch.manual_seed(0)
    return randomise(pk.create_model(name, features_only=True, **options)).eval()


def assert_like(ours, theirs, call):
    """The same by the error rule: ``call(model, x)`` in float32, and of timm's in float64."""
    with torch.no_grad():
        y, eager = call(ours, X), call(theirs, X)
        assert_close_to_fp64(y, eager, call(copy.deepcopy(theirs).double(), X.double()))


# ---- the head ----------------------------------------------------------------------------------------------


@both
def test_the_classifier(name):
    ours, theirs = timm_twins(name, num_classes=7)
    assert torch.equal(ours.get_classifier().weight, theirs.get_classifier().weight)
    assert ours.get_classifier() is ours.head
    for attribute in ("num_classes", "num_features", "head_hidden_size", "in_chans", "grad_checkpointing"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for model in (ours, theirs):
        model.reset_classifier(5, global_pool="avg")
    assert (ours.num_classes, ours.get_classifier().weight.shape) == (5, theirs.get_classifier().weight.shape)
    for model in (ours, theirs):
        model.reset_classifier(0)
    assert isinstance(ours.get_classifier(), nn.Identity)
    assert_like(ours, theirs, lambda model, x: model(x))
    with pytest.raises(ValueError, match=r"global_pool is 'max'; allowed: None, 'avg'"):
        ours.reset_classifier(5, "max")


@pytest.mark.sampled(3)
@both
def test_features_and_head(name):
    ours, theirs = timm_twins(name, num_classes=7)
    assert_like(ours, theirs, lambda model, x: model.forward_features(x))
    for pre_logits in (False, True):
        assert_like(
            ours, theirs, lambda model, x, p=pre_logits: model.forward_head(model.forward_features(x), p)
        )


# ---- maps --------------------------------------------------------------------------------------------------

INDICES = (None, 1, 2, [0, 2], [-1], [3, 1], (1, 1))


@pytest.mark.sampled(3)
@both
@pytest.mark.parametrize("early", [False, True])
def test_intermediates(name, early):
    ours, theirs = timm_twins(name, num_classes=7)
    double = copy.deepcopy(theirs).double()
    for indices in INDICES:
        options = {"indices": indices, "stop_early": early}
        with torch.no_grad():
            last, maps = ours.forward_intermediates(X, **options)
            eager = theirs.forward_intermediates(X, **options)
            exact = double.forward_intermediates(X.double(), **options)
            only = ours.forward_intermediates(X, **options, intermediates_only=True)
        assert all(map(torch.equal, only, maps))
        for y, there, right in zip([last, *maps], [eager[0], *eager[1]], [exact[0], *exact[1]], strict=True):
            assert_close_to_fp64(y, there, right)


def test_stages_behind_the_last_map_are_not_computed():
    ours, _ = timm_twins("poolformer_s12", num_classes=7)
    seen = []
    ours.network[4].register_forward_hook(lambda *_: seen.append(1))
    ours.forward_intermediates(X, [1], stop_early=True)
    assert not seen
    ours.forward_intermediates(X, [1])
    assert seen


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "parameters", "eps"),  # of a norm
    [("poolformer_s12", ("weight", "bias"), 1e-5), ("poolformerv2_s12", ("weight",), 1e-6)],
    ids=NAMES,
)
@pytest.mark.parametrize("out_indices", [None, (0, 1, 2, 3), (1, 3), (0, 2), (-3,), 2], ids=str)
def test_features_only(name, parameters, eps, out_indices):
    """timm's maps, each through its GroupNorm, of what timm's feature_info says; nothing is made in vain."""
    options = {} if out_indices is None else {"out_indices": out_indices}
    theirs = timm_model(name, features_only=True, **options)
    ours = backbone(name, **options)
    state = pk.convert_state_dict(theirs.state_dict())
    missing, unexpected = ours.load_state_dict(state, strict=False)
    info, wanted = ours.feature_info, theirs.feature_info
    taken = info.out_indices
    norms = [f"norm{2 * stage}" for stage in taken]
    assert (missing, unexpected) == ([f"{norm}.{key}" for norm in norms for key in parameters], [])
    assert info.channels() == wanted.channels()
    assert info.reduction() == wanted.reduction()
    assert info.channels(3) == wanted.channels(3) == info.channels(np.int64(3))
    assert info.get_dicts(["num_chs", "reduction"]) == wanted.get_dicts(["num_chs", "reduction"])
    assert info.module_name() == norms
    assert ours.num_features == info.channels()[-1]
    double = copy.deepcopy(theirs).double()
    x = randn(16, 3, 65, 97)  # so many images that the largest of all errors is no matter of luck
    with torch.no_grad():
        maps = ours.forward_intermediates(x, taken, intermediates_only=True)
        for y, eager, exact in zip(maps, theirs(x), double(x.double()), strict=True):
            assert_close_to_fp64(y, eager, exact)
        assert relative_error(ours.forward_features(x), maps[-1]) < 1e-6
        for normed, y, norm in zip(ours(x), maps, map(ours.get_submodule, norms), strict=True):
            assert torch.equal(normed, norm(y))
            p = dict(norm.named_parameters())
            assert relative_error(normed, F.group_norm(y, 1, p["weight"], p.get("bias"), eps)) < 1e-5
    sum(y.sum() for y in ours(X)).backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


def test_feature_info():
    """A classifier's is what timm's feature getter takes; position embeddings move names."""
    from timm.models._features import FeatureGetterNet

    ours, _ = timm_twins("poolformer_s12", num_classes=7)
    info = ours.feature_info
    assert info.module_name() == ["network.0", "network.2", "network.4", "network.6"]
    getter = FeatureGetterNet(ours, out_indices=(1, 3))
    for y, expected in zip(getter(X), ours.forward_intermediates(X, [1, 3])[1], strict=True):
        assert torch.equal(y, expected)
    for same in (copy.deepcopy(info), pickle.loads(pickle.dumps(info))):
        assert type(same) is FeatureInfo
        assert (same.channels(), same.info) == (info.channels(), info.info)
    attention = pk.create_model("metaformer_ppaa_s12_224", device="meta")
    for name in attention.feature_info.module_name():
        assert isinstance(attention.get_submodule(name), pk.nn.PoolFormerStage)


def test_maps_of_every_family():
    model = tiny(token_mixers=("pooling", "attention", "identity", "pooling"), norm_layer="layer")
    x = randn(2, 3, *SIZE)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert torch.equal(maps[-1], last)
        hooked = []
        for name in model.feature_info.module_name():
            model.get_submodule(name).register_forward_hook(lambda m, given, y: hooked.append(y))
        model(x)
        assert all(relative_error(y, expected) < 1e-6 for y, expected in zip(maps, hooked, strict=True))


def stage_maps(model, *args, **options):
    return model.forward_intermediates(X, *args, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),  # of a classifier and of a backbone of stages 1 and 2
    [
        (lambda m, f: stage_maps(m, [4]), ValueError, ("indices is [4]", "-4 to 3")),
        (lambda m, f: stage_maps(m, 5), ValueError, ("indices is 5", "1 to 4")),
        (lambda m, f: stage_maps(m, []), ValueError, ("indices is []", "-4 to 3")),
        (lambda m, f: stage_maps(m, [1.0]), TypeError, ("indices", "float")),
        (lambda m, f: stage_maps(m, output_fmt="NLC"), ValueError, ("output_fmt is 'NLC'", "NCHW")),
        (lambda m, f: stage_maps(m, norm=True), ValueError, ("norm is True", "features_only=True")),
        (lambda m, f: stage_maps(f, [0], norm=True), ValueError, ("norm is True", "stages 1, 2")),
        (lambda m, f: stage_maps(f, [3]), ValueError, ("indices is [3]", "-3 to 2")),
        (lambda m, f: backbone("poolformer_s12", out_indices=4.0), TypeError, ("out_indices", "float")),
        (lambda m, f: backbone("poolformer_s12", out_indices=[7]), ValueError, ("out_indices is [7]", "3")),
        (
            lambda m, f: pk.create_model("poolformer_s12", out_indices=[1]),
            ValueError,
            ("features_only=True",),
        ),
        (lambda m, f: m.set_grad_checkpointing("yes"), TypeError, ("enable", "bool", "str")),
    ],
)
def test_bad_arguments(call, error, words):
    model, features = pk.create_model("poolformer_s12"), backbone("poolformer_s12", out_indices=(1, 2))
    with raises(error, *words):
        call(model, features)


def test_files_for_a_part_of_the_backbone(tmp_path):
    """Whole files load: what the model has not made is named in the report."""
    _, theirs = timm_twins("poolformer_s12", num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    torch.save(backbone("poolformer_s12").state_dict(), tmp_path / "dense.pth")
    model = backbone("poolformer_s12", out_indices=(0, 2))
    report = pk.load_checkpoint(model, tmp_path / "timm.pth")
    assert torch.equal(model.network[4][5].mlp.fc2.weight, theirs.stages[2].blocks[5].mlp.fc2.weight)
    assert {key.split(".")[0] for key in report.not_in_file} == {"norm0", "norm4"}
    left_out = {".".join(key.split(".")[:2]) for key in report.not_in_model if key.startswith("network")}
    assert left_out == {"network.5", "network.6"}
    report = pk.load_checkpoint(model, tmp_path / "dense.pth")
    assert not report.not_in_file
    assert {key.split(".")[0] for key in report.not_in_model} == {"norm2", "norm6", "network"}


def test_a_detector_needs_all_maps():
    require("torchvision")
    from poolformer_kernels.dense.backbone import feature_backbone

    with pytest.raises(ValueError, match=r"stages \(1, 2\); allowed: one made without out_indices"):
        feature_backbone(backbone("poolformer_s12", out_indices=(1, 2)), {})


# ---- data and parameters -----------------------------------------------------------------------------------

ALL = [*pk.list_models("poolformer_*"), *pk.list_models("poolformerv2_*")]


@pytest.mark.parametrize("name", ALL)
def test_pretrained_cfg(name):
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        ours, theirs = (package.create_model(name, in_chans=1) for package in (pk, timm))
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    assert ours.default_cfg is ours.pretrained_cfg
    names = {"first_conv": "patch_embed.proj", "classifier": "head"}
    for key, value in theirs.pretrained_cfg.items():
        if key in ours.pretrained_cfg:
            assert ours.pretrained_cfg[key] == names.get(key, value), key
    assert {*names, "num_classes", "hf_hub_id", "url", "input_size", "crop_pct"} <= ours.pretrained_cfg.keys()
    for key, cls in (("first_conv", nn.Conv2d), ("classifier", nn.Linear)):
        assert isinstance(ours.get_submodule(ours.pretrained_cfg[key]), cls)


def test_the_data_of_another_image_size():
    from timm.data import resolve_model_data_config

    model = pk.create_model("metaformer_ppaa_s12_224", image_size=(96, 160), device="meta")
    assert resolve_model_data_config(model)["input_size"] == (3, 96, 160)
    assert model.pretrained_cfg["hf_hub_id"] is None


@both
def test_groups_of_parameters(name):
    """The same parameters without weight decay as in timm's model; the learning rate falls with depth."""
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    ours, theirs = timm_twins(name, num_classes=7)
    named, twin = (
        {id(p): key for key, p in pk.convert_state_dict(dict(model.named_parameters())).items()}
        for model in (ours, theirs)
    )

    def names(groups, of):
        return [{of[id(p)] for p in group["params"]} for group in groups]

    skipped = ours.no_weight_decay()
    decayed = names(param_groups_weight_decay(ours, 0.1, no_weight_decay_list=skipped), named)
    assert decayed == names(param_groups_weight_decay(theirs, 0.1), twin)
    depths = {}
    for group in param_groups_layer_decay(ours, 0.1, skipped, layer_decay=0.5):
        for p in group["params"]:
            depths[named[id(p)]] = group["lr_scale"]
    order = ["patch_embed.proj.weight", "network.0.0.mlp.fc1.weight", "network.0.1.norm1.weight"]
    order += ["network.1.proj.weight", "network.2.0.mlp.fc2.weight", "network.6.1.mlp.fc2.weight"]
    scales = [depths[key] for key in order]
    assert scales == sorted(set(scales))
    assert depths["head.weight"] == depths["norm.weight"] == max(depths.values())
    assert depths["network.0.0.mlp.fc1.weight"] == depths["network.0.0.norm2.weight"]
    assert len(set(depths.values())) == 1 + 3 + 12 + 1  # stem, downsamples, blocks, head
    assert len(group_parameters(ours, ours.group_matcher(coarse=True))) == 1 + 7 + 1


def test_position_embeddings_do_not_decay():
    model = pk.create_model("metaformer_ppaa_s12_224", device="meta")
    assert model.no_weight_decay() == {key for key in model.state_dict() if key.endswith("pos_embed")}
    assert len(model.no_weight_decay()) == 1
    assert pk.create_model("poolformer_s12", device="meta").no_weight_decay() == set()


# ---- checkpointing of gradients ----------------------------------------------------------------------------


def step(model, x):
    """The loss and the gradients of one training step, from the same draws."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(3)
    y = model(x)
    loss = sum(t.square().mean() for t in (y if isinstance(y, list) else [y]))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


CHECKPOINTED = {
    "PoolFormer": lambda: timm_twins("poolformer_s12", num_classes=7, drop_path_rate=0.3)[0],
    "PoolFormerV2": lambda: timm_twins("poolformerv2_s12", num_classes=7, drop_path_rate=0.3)[0],
    "MetaFormer": lambda: tiny(
        token_mixers=("pooling", "identity", "attention", "pooling"), drop_path_rate=0.3
    ),
    "backbone": lambda: backbone("poolformer_s12", out_indices=(1, 3), drop_path_rate=0.3),
    "hooked": lambda: hooked(timm_twins("poolformer_s12", num_classes=7, drop_path_rate=0.3)[0]),
}


def hooked(model):
    """A block that is called as a module."""
    model.network[4][1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients(name, layout, backend):
    model = CHECKPOINTED[name]().train()
    x = randn(4, 3, *SIZE).contiguous(memory_format=getattr(torch, layout))
    expected = step(model, x)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    calls, paths = [], [module for module in model.modules() if isinstance(module, pk.nn.DropPath)]
    handles = [path.register_forward_hook(lambda *_: None) for path in paths]
    handles += [path.register_forward_pre_hook(lambda *_: calls.append(1)) for path in paths]
    with_hooks = step(model, x)
    assert len(calls) == 2 * 2 * len(paths)  # all ran twice
    for handle in handles:
        handle.remove()
    given = step(model, x)
    assert all(map(torch.equal, given, expected))
    torch.testing.assert_close(with_hooks, expected, rtol=1e-3, atol=1e-4)
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing
    assert all(map(torch.equal, step(model, x), expected))


def test_checkpointing_with_draws_that_are_given():
    """As `poolformer-kernels train` gives them: the second run of a block drops what the first did."""
    model, _ = timm_twins("poolformer_s12", num_classes=7, drop_path_rate=0.5)
    paths = [m for m in model.train().modules() if isinstance(m, pk.nn.DropPath)]
    x = randn(6, 3, 32, 32)

    def given():
        generator = torch.Generator().manual_seed(0)
        for path in paths:
            path.draws, path.calls = torch.rand((2, 6), generator=generator), 0
        result = step(model, x)
        assert [path.calls for path in paths] == [2] * len(paths)
        return result

    expected = given()
    model.set_grad_checkpointing()
    assert all(map(torch.equal, given(), expected))


MEMORY = """
import sys
import torch
import poolformer_kernels as pk
from support.memory import peak_of

torch.set_num_threads(1)
model = pk.create_model("poolformer_s24", num_classes=10).to(memory_format=torch.channels_last)
model.set_grad_checkpointing(sys.argv[1] == "True")
x = torch.randn(4, 3, 160, 160).contiguous(memory_format=torch.channels_last)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
model(x[:1, :, :32, :32]).sum().backward()
print(peak_of(lambda: model(x).sum().backward()))
"""


@pytest.mark.long
def test_checkpointing_saves_memory():
    """The peak of a training step above what the process had before: at most six tenths."""
    require_peaks()
    peaks = {enable: int(python("-c", MEMORY, enable, **MALLOC).stdout) for enable in (False, True)}
    assert peaks[True] < 0.6 * peaks[False], peaks


def test_compiled_with_checkpointing(fresh_dynamo):
    model, x = tiny(), randn(2, 3, *SIZE)
    expected = step(model.train(), x)
    model.set_grad_checkpointing()
    given = step(torch.compile(model, backend="aot_eager"), x)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)
