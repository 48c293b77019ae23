"""The package's version, for what lies below the package's own namespace."""

__version__ = "0.2.0"
