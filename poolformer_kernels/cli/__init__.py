"""The command line, `poolformer-kernels`: one module per command."""
