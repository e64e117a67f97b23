"""The command line: `globenc attribute`, `globenc extract`, `globenc evaluate` and `globenc models`.

Torch and transformers are imported where they are used, so that --help and --version answer at once.
"""

from .app import app, main

__all__ = ["app", "main"]
