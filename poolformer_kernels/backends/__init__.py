"""The kernels, a module per backend: why it is UNAVAILABLE (or None), and the DEVICES it runs on.

Importing a backend registers its kernels under the schemas of `poolformer_kernels.ops`.
"""

from . import cpp, cuda, triton

__all__ = ["cpp", "cuda", "triton"]
