"""Texts to token ids and back to characters and words: `encode` makes an `Encoding` of each text."""

from .encode import encode as encode
from .records import Encoding as Encoding
