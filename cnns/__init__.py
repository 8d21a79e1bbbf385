"""What the scripts of the root and the tools are made of."""

__version__ = "0.1.0"  # of the toolkit
