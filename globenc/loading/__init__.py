"""From a name or a folder to a model and its tokenizer or image processor: the only way in which anything is loaded.

Nothing in a folder is taken on trust. Weights are read from safetensors files inside it and handed to transformers as
tensors, so that it looks for no other file. What came of it is compared with what the model needs and with what the
files hold: transformers makes up random numbers for weights that are missing, and drops those that it has no place for.
"""

from .files import LoadingError, sentence_of
from .load import load, load_processor, stored_dtype
from .source import DEFAULT_MODEL, DEFAULT_NAME, ModelSource

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_NAME",
    "LoadingError",
    "ModelSource",
    "load",
    "load_processor",
    "sentence_of",
    "stored_dtype",
]
