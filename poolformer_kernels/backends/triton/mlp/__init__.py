"""The MLP's kernels: forward, backward, and the tiles and launches of each size."""
