"""The version, for modules that name it below the package's own level."""

__version__ = "0.1.0"
