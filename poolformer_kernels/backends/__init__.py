"""The kernels, one module per backend. Each says why it is UNAVAILABLE (or None) and on which DEVICES it
runs.

Importing a backend registers its kernels under the schemas of `poolformer_kernels.ops`.
"""

from .. import ops  # isort: skip  (the schemas come first)
from . import cpp, triton

__all__ = ["cpp", "ops", "triton"]
