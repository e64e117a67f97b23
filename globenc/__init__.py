"""Exact GlobEnc token attribution for transformer encoders, at about the price of a forward pass.

>>> import globenc
>>> explainer = globenc.GlobEnc.from_pretrained()
>>> explainer("a charming and often affecting journey").label
'positive'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import metrics as metrics
    from .attribution import Attribution as Attribution
    from .encoders import EncoderFamily as EncoderFamily
    from .encoders import register_encoder as register_encoder
    from .encoders import supported_encoders as supported_encoders
    from .evaluation.presets import evaluate_preset as evaluate_preset
    from .evaluation.run import Evaluation as Evaluation
    from .evaluation.run import evaluate as evaluate
    from .explainer import GlobEnc as GlobEnc
    from .extraction.reading import load_extract as load_extract
    from .extraction.run import extract as extract
    from .frozen.scores import ClassScores as ClassScores
    from .frozen.scores import class_scores as class_scores
    from .functional import AttributionOutput as AttributionOutput
    from .functional import MethodsOutput as MethodsOutput
    from .functional import attribute as attribute
    from .functional import compare_methods as compare_methods
    from .images import ImageAttribution as ImageAttribution
    from .layer_maps import completeness_gap as completeness_gap
    from .layer_maps import contribution_maps as contribution_maps
    from .layer_maps import mixing_ratios as mixing_ratios
    from .loading import ModelSource as ModelSource
    from .rollouts import rollout as rollout
    from .text_spans import Passage as Passage
    from .text_spans import Word as Word

# name: module that it is imported from at first use, so that the command line's --help need not wait for torch and
# transformers; editors and mypy read the imports above, which tests/test_imports.py compares with these
_LAZY = {
    "Attribution": "attribution",
    "AttributionOutput": "functional",
    "ClassScores": "frozen.scores",
    "EncoderFamily": "encoders",
    "Evaluation": "evaluation.run",
    "GlobEnc": "explainer",
    "ImageAttribution": "images",
    "MethodsOutput": "functional",
    "ModelSource": "loading",
    "Passage": "text_spans",
    "Word": "text_spans",
    "attribute": "functional",
    "class_scores": "frozen.scores",
    "compare_methods": "functional",
    "completeness_gap": "layer_maps",
    "contribution_maps": "layer_maps",
    "evaluate": "evaluation.run",
    "evaluate_preset": "evaluation.presets",
    "extract": "extraction.run",
    "load_extract": "extraction.reading",
    "mixing_ratios": "layer_maps",
    "register_encoder": "encoders",
    "rollout": "rollouts",
    "supported_encoders": "encoders",
}

__all__ = ["__version__", "metrics", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module(".metrics", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
