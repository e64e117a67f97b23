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
    from . import metrics
    from .attribution import Attribution
    from .encoders import EncoderFamily, register_encoder, supported_encoders
    from .evaluation.presets import evaluate_preset
    from .evaluation.run import Evaluation, evaluate
    from .explainer import GlobEnc
    from .extraction.reading import load_extract
    from .extraction.run import extract
    from .functional import (
        AttributionOutput,
        MethodsOutput,
        attribute,
        compare_methods,
        completeness_gap,
        contribution_maps,
        mixing_ratios,
    )
    from .loading import ModelSource
    from .pictures import PictureAttribution
    from .rollouts import rollout
    from .text_spans import Passage, Word

# imported at first use, so that the command line's --help need not wait for torch and transformers
_MODULES = {
    "Attribution": "attribution",
    "AttributionOutput": "functional",
    "EncoderFamily": "encoders",
    "Evaluation": "evaluation.run",
    "GlobEnc": "explainer",
    "MethodsOutput": "functional",
    "ModelSource": "loading",
    "Passage": "text_spans",
    "PictureAttribution": "pictures",
    "Word": "text_spans",
    "attribute": "functional",
    "compare_methods": "functional",
    "completeness_gap": "functional",
    "contribution_maps": "functional",
    "evaluate": "evaluation.run",
    "evaluate_preset": "evaluation.presets",
    "extract": "extraction.run",
    "load_extract": "extraction.reading",
    "mixing_ratios": "functional",
    "register_encoder": "encoders",
    "rollout": "rollouts",
    "supported_encoders": "encoders",
}

__all__ = [
    "Attribution",
    "AttributionOutput",
    "EncoderFamily",
    "Evaluation",
    "GlobEnc",
    "MethodsOutput",
    "ModelSource",
    "Passage",
    "PictureAttribution",
    "Word",
    "__version__",
    "attribute",
    "compare_methods",
    "completeness_gap",
    "contribution_maps",
    "evaluate",
    "evaluate_preset",
    "extract",
    "load_extract",
    "metrics",
    "mixing_ratios",
    "register_encoder",
    "rollout",
    "supported_encoders",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module(".metrics", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
