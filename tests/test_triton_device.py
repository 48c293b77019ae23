"""What the Triton launchers choose their tiles by: a device's architecture and its shared memory."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from poolformer_kernels.backends.triton import device
from poolformer_kernels.backends.triton.device import DEVICES, device_of
from poolformer_kernels.backends.triton.mlp import config


def on_gpu(index: int) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, get_device=lambda: index)


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[int]]:
    """A machine with an H100 and an RTX 5090; the GPUs that torch was asked about."""
    gpus = ((9, 0, 232448), (12, 0, 101376))
    asked = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        major, minor, shared = gpus[index]
        return SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device._gpu.cache_clear()
    yield asked
    device._gpu.cache_clear()


def test_two_gpus_of_one_process_have_their_own(asked) -> None:
    found = [device_of(on_gpu(index)) for index in (0, 1, 0, 1)]
    assert found == [DEVICES[90], DEVICES[120]] * 2
    assert asked == [0, 1]
    first, second = (config.fc2_tiles(320, 2, d).stages for d in found[:2])
    assert (first, second) == (4, 2)


def test_a_tensor_on_no_gpu_is_configured_for_the_assumed_one() -> None:
    x = torch.empty(1)
    assert device_of(x) == DEVICES[90]
    with device.assumed(DEVICES[89]):
        assert device_of(x) == DEVICES[89]
    assert device_of(x) == DEVICES[90]


def test_devices_whose_products_read_registers() -> None:
    """8.x and 12.x have mma.sync alone: what suits Hopper spills 288 bytes at C = 128 on 12.0."""
    found = {arch for arch, d in DEVICES.items() if d.register_operands}
    assert found == {80, 86, 87, 89, 120, 121}
    for arch, d in DEVICES.items():
        launch = config.backward_launch(128, 128, 512, 2, d)
        assert launch.weight_tokens == (16 if arch in found else 32)
        assert config.fused_forward_tiles(64, 2, d).hidden == (32 if arch in found else 64)
