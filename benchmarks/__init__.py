"""What `poolformer-kernels bench` measures, and the plots and tables of it.

This folder lies beside the package `poolformer_kernels` in a source tree and inside it where it is installed.
The command line loads it as ``poolformer_kernels.benchmarks`` in both.
"""
