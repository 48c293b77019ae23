"""What the device says of the kernels is what the build said: `poolformer-kernels info --kernels`."""

import pytest
import torch

from poolformer_kernels.backends.cpp import build_info
from poolformer_kernels.cli.kernels import built_kernels, kernels

pytestmark = pytest.mark.skipif(
    not build_info().get("cuda_archs"), reason="the extension was built without nvcc"
)


@pytest.mark.host
def test_the_device_and_the_build_agree():
    major, minor = torch.cuda.get_device_capability()
    built = {(row.name, row.arch, row.threads, row.dynamic_shared): row for row in built_kernels()}
    found = [k for k in kernels() if k.arch.rstrip("af") == f"sm_{major}{minor}"]
    assert found
    for kernel in found:
        said = built.get((kernel.name, kernel.arch, kernel.threads, kernel.dynamic_shared))
        if said is not None:  # the driver compiled no PTX
            assert kernel == said
        assert kernel.blocks >= (1 if major == 9 or "_sm90" not in kernel.name else 0)
