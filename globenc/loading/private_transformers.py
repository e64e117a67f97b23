"""What loading uses of transformers that is no part of its public interface, and why; a new version may move it.

Whatever else this package imports of transformers is documented there.
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import hub
from transformers.utils import logging as transformers_logging

MODELING_LOGGER = "transformers.modeling_utils"  # reports weights that are missing, unexpected or tied
REPORTS = ("LOAD REPORT", "The tied weights mapping")  # how those reports begin


def cached_file(name: str, file: str, revision: str) -> Path | None:
    """A file of a model on the hub; None where the model has none of that name.

    `huggingface_hub.hf_hub_download` would raise for a missing file, and know neither transformers' settings for
    offline use nor its sentences for what goes wrong.
    """
    path = hub.cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else Path(path)


def converted_weights(name: str, revision: str) -> tuple[Path | None, str]:
    """Weights that the hub's service has converted to safetensors for a model without any, in a pull request; and the
    revision they are in. `from_pretrained` looks there too, but not where it is handed the weights as tensors."""
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_commit_hash": None}
    path, revision, _ = auto_conversion(name, revision=revision, **options)
    return None if path is None else Path(path), revision


def class_from_code(reference: str, name: str, revision: str | None) -> type:
    """A class from code that comes with a model: `AutoModel` would choose another than config.json names."""
    return get_class_from_dynamic_module(reference, name, revision=revision)


def auto_classes() -> list[Any]:
    """Every `AutoModel...` class; there is no public list of them."""
    return [auto for auto in vars(modeling_auto).values() if getattr(auto, "_model_mapping", None) is not None]


def classes_for(auto: Any, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an `AutoModel...` class knows for this kind of configuration, registered ones too: which class
    is loaded has to be known before it is."""
    classes = auto._model_mapping.get(type(config), ())
    return classes if isinstance(classes, tuple) else (classes,)


def has_class_for(auto: Any, config: PreTrainedConfig) -> bool:
    """Whether an `AutoModel...` class knows this kind of configuration."""
    return type(config) in auto._model_mapping


def forget_attention(config: PreTrainedConfig) -> None:
    """Without the attention implementation that a config.json names: the attention is this package's own, and a name in
    a file could also fetch code from the hub."""
    config._attn_implementation = None


def silence_progress_bars(silenced: ContextVar[bool]) -> None:
    """No progress bar in threads where `silenced` is set; `disable_progress_bar` would silence all threads. A hook that
    was set before, which no public function returns, stays in force elsewhere."""
    earlier = transformers_logging._tqdm_hook
    if not isinstance(earlier, _BarHook):
        transformers_logging.set_tqdm_hook(_BarHook(earlier, silenced))


class _BarHook:
    def __init__(self, earlier: Any, silenced: ContextVar[bool]):
        self._earlier, self._silenced = earlier, silenced

    def __call__(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._silenced.get():
            return transformers_logging.EmptyTqdm(*args, **kwargs)
        return factory(*args, **kwargs) if self._earlier is None else self._earlier(factory, args, kwargs)
