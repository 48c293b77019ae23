"""`python -m poolformer_kernels` is `poolformer-kernels`."""

import sys

from .cli.main import main

sys.exit(main())
