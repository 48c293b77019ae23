"""What the MetaFormer tests share: a small model, and every model as functions of its state dict."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from poolformer_kernels.models import MetaFormer, MetaFormerConfig, model_config
from support.peers import randomise

LAYERS, DIMS = (1, 1, 2, 1), (32, 32, 64, 96)
SIZE = (40, 56)  # 10 x 14, 5 x 7, 3 x 4 and 2 x 2 pixels


class Shift(nn.Module):
    """A mixer of a user's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight.view(-1, 1, 1) * x.roll(1, 3)


def config(**structure) -> MetaFormerConfig:
    options = {"layer_scale_init": 1e-5, "image_size": SIZE, **structure}
    return MetaFormerConfig("tiny", LAYERS, DIMS, drop_path_rate=0.1, params=None, crop_pct=1.0, **options)


def tiny(features_only=False, head="official", drop_path_rate=0.0, **structure) -> MetaFormer:
    torch.manual_seed(0)
    model = MetaFormer(
        config(**structure), 7, head=head, features_only=features_only, drop_path_rate=drop_path_rate
    )
    for name, p in randomise(model).named_parameters():
        if "fc" in name or "token_mixer" in name or "pos_embed" in name:  # so that every branch matters
            nn.init.normal_(p, 0.1, 0.3 if "mlp" in name else 0.2)
    for name, b in model.named_buffers():
        if "running" in name:
            b.uniform_(0.5, 1.5)
    return model.eval()


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape in the released checkpoint of a PoolFormer or MetaFormer, in the order of the file."""
    config = model_config(name)
    kinds = name.split("_")[1] if name.startswith("metaformer") else "pppp"
    kinds = kinds.replace("id", "iiii")
    state = {}

    def add(key, *shape, bias=True):
        state[f"{key}.weight"] = shape
        if bias:
            state[f"{key}.bias"] = shape[:1]

    add("patch_embed.proj", config.dims[0], 3, 7, 7)
    index = 0
    for stage, (kind, dim, depth) in enumerate(zip(kinds, config.dims, config.layers, strict=True)):
        side = 56 >> stage
        if stage:
            add(f"network.{index}.proj", dim, config.dims[stage - 1], 3, 3)
            index += 1
        if kind == "a" and "a" not in kinds[:stage]:
            state[f"network.{index}.pos_embed"] = (1, dim, side, side)
            index += 1
        for i in range(depth):
            key = f"network.{index}.{i}"
            state[f"{key}.layer_scale_1"] = state[f"{key}.layer_scale_2"] = (dim,)
            add(f"{key}.norm1", dim)
            add(f"{key}.norm2", dim)
            add(f"{key}.mlp.fc1", 4 * dim, dim, 1, 1)
            add(f"{key}.mlp.fc2", dim, 4 * dim, 1, 1)
            if kind == "a":
                add(f"{key}.token_mixer.qkv", 3 * dim, dim, bias=False)
                add(f"{key}.token_mixer.proj", dim, dim)
            if kind == "f":
                add(f"{key}.token_mixer.fc", side**2, side**2, bias=False)
        index += 1
    add("norm", config.dims[-1])
    add("head", 1000, config.dims[-1])
    return state


# ---- the twin ----------------------------------------------------------------------------------------------


def norm(x, state, key, c):
    weight, bias = state.get(f"{key}.weight"), state.get(f"{key}.bias")
    if c.norm_layer == "group":
        return F.group_norm(x, 1, weight, bias)
    if c.norm_layer == "layer":
        u = x.mean(1, keepdim=True)
        n = (x - u) / ((x - u).square().mean(1, keepdim=True) + 1e-5).sqrt()
        return weight.view(-1, 1, 1) * n + bias.view(-1, 1, 1)
    if c.norm_layer == "batch":
        return F.batch_norm(x, state[f"{key}.running_mean"], state[f"{key}.running_var"], weight, bias)
    return x


def mix(n, state, key, kind, c):
    if kind == "pooling":
        return F.avg_pool2d(n, c.pool_size, 1, c.pool_size // 2, count_include_pad=False) - n
    if kind == "identity":
        return n
    if kind == "convolution":
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        return F.conv2d(n, weight, bias, padding=c.pool_size // 2, groups=n.shape[1])
    if kind == "random_matrix":
        return torch.einsum("mn,bcn->bcm", state[f"{key}.random_matrix"], n.flatten(2)).view(n.shape)
    if kind == "spatial_fc":
        return torch.einsum("mn,bcn->bcm", state[f"{key}.fc.weight"], n.flatten(2)).view(n.shape)
    if kind == "attention":
        batch, dim, height, width = n.shape
        qkv = torch.einsum("oc,bcn->bno", state[f"{key}.qkv.weight"], n.flatten(2))
        q, k, v = qkv.reshape(batch, -1, 3, dim // 32, 32).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3)) * 32**-0.5).softmax(3) @ v
        y = F.linear(y.transpose(1, 2).flatten(2), state[f"{key}.proj.weight"], state[f"{key}.proj.bias"])
        return y.transpose(1, 2).reshape(batch, dim, height, width)
    return state[f"{key}.weight"].view(-1, 1, 1) * n.roll(1, 3)


def twin(c: MetaFormerConfig, state, x):
    """The last map and the logits, from the official formulas."""
    act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, nn.Tanh: torch.tanh}[c.act_layer]
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4, 2)
    index = -1
    for stage, kind in enumerate(c.token_mixers):
        index += 1
        if stage:
            key = f"network.{index}.proj"
            x = F.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], 2, 1)
            index += 1
        if kind == "attention" and "attention" not in c.token_mixers[:stage]:
            x = x + state[f"network.{index}.pos_embed"]
            index += 1
        for i in range(c.layers[stage]):
            key = f"network.{index}.{i}"
            s1, s2 = (state.get(f"{key}.layer_scale_{n}", x.new_ones(1)).view(-1, 1, 1) for n in (1, 2))
            y = s1 * mix(norm(x, state, f"{key}.norm1", c), state, f"{key}.token_mixer", kind, c)
            x = x + y if c.residual else y
            if c.mlp:
                n = norm(x, state, f"{key}.norm2", c)
                h = act(F.conv2d(n, state[f"{key}.mlp.fc1.weight"], state[f"{key}.mlp.fc1.bias"]))
                y = s2 * F.conv2d(h, state[f"{key}.mlp.fc2.weight"], state[f"{key}.mlp.fc2.bias"])
                x = x + y if c.residual else y
    return x, F.linear(norm(x, state, "norm", c).mean((2, 3)), state["head.weight"], state["head.bias"])


def official_model(state, x, layers=(2, 2, 6, 2)):
    """The same of a PoolFormer with the official head."""
    return twin(replace(config(), layers=layers), state, x)
