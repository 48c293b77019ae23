"""`python -m poolformer_kernels` is `poolformer-kernels`."""

import sys

from .cli import main

sys.exit(main())
