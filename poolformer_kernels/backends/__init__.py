"""The kernels, one module per backend. Each says why it is UNAVAILABLE (or None) and on which DEVICES it runs."""
