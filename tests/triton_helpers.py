"""What the ahead-of-time tests share: parameters, and what an architecture's machine code must contain."""

import pytest

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # mma.sync, wgmma, tcgen05


def parameters(usual: list, rest: list, arch: int) -> list:
    """(launch, architecture) for each launch of both lists of cases; what only the rest launches is long."""
    from poolformer_kernels.backends.triton import aot, device

    short = aot.distinct(usual, device.DEVICES[arch])
    return [
        pytest.param(
            *(launch, arch), id=f"{launch.name}-{arch}", marks=[] if launch in short else [pytest.mark.long]
        )
        for launch in aot.distinct([*usual, *rest], device.DEVICES[arch])
    ]
