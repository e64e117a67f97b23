"""`python -m globenc` is `globenc`."""

from .cli import main

main()
