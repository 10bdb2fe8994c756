"""Personalize foundation models over many clients' private data, and hear it when their behaviour silently fails."""

__version__ = "0.1.0"
