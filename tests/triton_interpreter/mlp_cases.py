"""What the tests of the MLP's forward and of its operator share."""

import torch
from support.problems import HALVES

KINDS = ((torch.float32, "nchw"), *((dtype, "channels_last") for dtype in HALVES))

# x, hidden: samples that share tiles, several tiles, C in one and in two parts, padded; cut chunks. Above 96
# channels fp32 is a pair.
FUSED = (
    ((3, 64, 7, 9), 128),
    ((1, 96, 8, 16), 70),
    ((2, 128, 6, 7), 65),
    ((1, 192, 5, 13), 40),
    ((5, 17, 4, 9), 30),
    ((2, 1, 9, 4), 3),
    ((1, 80, 1, 33), 16),
)
PAIR = (  # wide, or so few pixels that a tile has many samples
    ((3, 320, 7, 7), 96),
    ((2, 200, 6, 6), 50),
    ((1, 513, 2, 16), 31),
    ((67, 5, 1, 3), 9),
    ((3, 33, 1, 1), 7),
)
ONE_OF_EACH = (FUSED[0], PAIR[1])
