"""A benchmark whose results are not compared, for the null GPU, which computes nothing.

python tests/gpu/dry_bench.py model --batch 1 --image-size 32 --rounds 1
"""

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # where PYTHONPATH has no package


class NoErrors:
    """In the place of `poolformer_kernels.numerics.Errors`."""

    def relative_l2(self, scale: object) -> float:
        return 0.0


def main() -> int:
    from poolformer_kernels.cli.errors import report_errors
    from poolformer_kernels.cli.main import load_benchmarks

    package = load_benchmarks()
    from poolformer_kernels.benchmarks import bench_training, providers

    providers.errors = lambda value, exact: NoErrors()
    bench_training.loss_error = lambda losses, exact: 0.0
    bench_training.gradient_errors = lambda gradients, exact: {}
    bench_training.wrong_gradient = lambda errors, eager, dtype: None
    benchmark = import_module(f".bench_{sys.argv[1].replace('-', '_')}", package.__name__)
    return report_errors(sys.argv[1], lambda: benchmark.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
