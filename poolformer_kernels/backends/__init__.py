"""The kernels, a module per backend; see `poolformer_kernels.ops.dispatch.Backend` for what each offers.

Importing a backend registers it for dispatch, and its kernels under the schemas of `poolformer_kernels.ops`.
"""

from . import cpp, cuda, triton

__all__ = ["cpp", "cuda", "triton"]
