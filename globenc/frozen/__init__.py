"""The frozen network of a text: everything held that is no straight line, so that what is left is affine."""

from .network import Answer, FrozenNetwork

__all__ = ["Answer", "FrozenNetwork"]
