"""The values that axes of the contract's tests have in common."""

import torch
from support.problems import HALVES

from poolformer_kernels import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, *HALVES)
TWO = (F32, BF16)
FORMATS = ("nchw", "channels_last")
BOTH = (False, True)
ACTIVATIONS = tuple(reference.ACTIVATIONS)
INF, NAN = float("inf"), float("nan")

# x, hidden
TINY = ((3, 5, 6, 7), 9)
SMALL = ((3, 17, 6, 9), 20)
WIDE = ((3, 200, 3, 6), 50)  # from about 100 channels on Triton has kernels of its own for each product
EACH = {"shape, hidden": [SMALL, WIDE]}
