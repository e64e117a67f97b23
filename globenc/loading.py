"""From a name or a folder to a model and its tokenizer or image processor: one way, for everyone who loads.

Nothing in a folder is taken on trust. Weights are read from safetensors files inside it and handed to transformers as
tensors, so that it looks for no other file. What came of it is compared with what the model needs and with what the
files hold: transformers makes up random numbers for weights that are missing, and drops those that it has no place for.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import hub
from transformers.utils import logging as transformers_logging

from .encoders import family_of_config, find_family, layer_list, supported_encoders
from .model_state import Loan

DEFAULT_MODEL = Path(__file__).parent / "default_model"
DEFAULT_NAME = "globenc-sst2-small"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


# heads that say nothing of a whole text or picture; saved alone, an encoder keeps their names in its config.json
_PRETRAINING = re.compile("For(Masked[A-Z]|PreTraining|CausalLM)|LMHead")


class LoadingError(OSError):
    """Why a model cannot be loaded, in one sentence that names the model."""


class _HeadError(LoadingError):
    """All that is missing belongs to the head."""


@dataclass(frozen=True)
class _Source:
    """A folder or hub name to load from."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def folder(self) -> Path | None:
        return Path(self.name) if Path(self.name).is_dir() else None

    def refuse(self, why: str) -> LoadingError:
        return LoadingError(f"model {self.name!r} cannot be loaded: {why}")

    def refuse_code(self) -> ValueError:
        return ValueError(f"model {self.name!r} brings code of its own: allow it with trust_remote_code=True")

    def optional_file(self, file: str) -> Path | None:
        """A file of the model, fetched if need be; None where it has none of that name."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        found = hub.cached_file(
            self.name,
            file,
            revision=self.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return None if found is None else Path(found)


@dataclass(frozen=True)
class ModelSource:
    """Which model is loaded, and how: for `globenc.extract`, `globenc.evaluate` and `GlobEnc.from_pretrained`.

    Attributes:
        name: folder or hub name; None is the small sentiment classifier that ships with globenc.
        device: where it runs; None is the GPU where there is one, else the CPU.
        dtype: of the weights, such as "float32"; None is the stored one on a GPU, and float32 on a CPU where half
            precision is stored.
        backend: "auto", "torch", "triton" or "reference", as in `globenc.attribute`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow code that comes with the model to run.

    >>> import globenc
    >>> globenc.GlobEnc.from_pretrained(globenc.ModelSource(dtype="float64")).model.dtype
    torch.float64
    """

    name: str | Path | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


def load(
    name_or_path: str | Path | None,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode where it is to run, and its tokenizer or image processor.

    Arguments and errors are those of `GlobEnc.from_pretrained`.
    """
    source = _Source(_model_source(name_or_path), revision, trust_remote_code)
    place, chosen = _device(device), _dtype(dtype)
    whole = _config(source)
    encoder, config = _encoder_of(whole)
    pictures = family_of_config(config, source.name).patches is not None
    _check_sizes(source, config)
    with contextlib.ExitStack() as files:
        with _errors_of(source, "its weights"):
            weights = _open_weights(source, whole, files)
        if chosen is None:
            chosen = _stored(whole, weights)
            if place.type == "cpu" and chosen.itemsize < 4:
                chosen = torch.float32
        model, word = _Checkpoint(source, whole, config, encoder, weights, chosen).model()
    if word is not None:
        warnings.warn(word, stacklevel=3)
    reader = load_processor(source.name, pictures, **source.options)
    if name_or_path is None:
        model.config._name_or_path = DEFAULT_NAME
    return model.to(place).eval(), reader


def load_processor(name: str, pictures: bool, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or its image processor.

    Raises:
        OSError, ValueError: it has none that can be used.
    """
    source = _Source(name, revision, trust_remote_code)
    with _errors_of(source, "its image processor" if pictures else "its tokenizer", _PROCESSOR_FILES):
        loader = AutoImageProcessor if pictures else AutoTokenizer
        try:
            found = loader.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            file = "preprocessor_config.json" if pictures else "tokenizer_config.json"
            path = source.optional_file(file)
            if path is not None and _is_json_object(path):
                _check_kinds(source, file, json.loads(path.read_text(encoding="utf-8")))
            if "backend tokenizer" in str(error) and source.optional_file("tokenizer.json") is None:
                raise source.refuse(
                    "it has no tokenizer.json: save its tokenizer beside it, or use GlobEnc(model, tokenizer)"
                ) from error
            raise
        if pictures:
            return found
        if len(found) <= len(found.all_special_ids):
            raise LoadingError(
                f"model {name!r} has no tokenizer: save its tokenizer beside it, or use GlobEnc(model, tokenizer)"
            )
        longest = found.model_max_length
        if not isinstance(longest, int | float) or not longest >= 1 or longest != int(longest):
            raise source.refuse(
                f"model_max_length in tokenizer_config.json must be a positive whole number, got {longest!r}"
            )
        found.model_max_length = int(longest)
        return found


def stored_dtype(name_or_path: str | Path | None, revision: str | None, trust_remote_code: bool) -> torch.dtype:
    """The dtype that a checkpoint is stored in."""
    source = _Source(_model_source(name_or_path), revision, trust_remote_code)
    config = _config(source)
    with contextlib.ExitStack() as files, _errors_of(source, "its weights"):
        return _stored(config, _open_weights(source, config, files))


# what is asked for


def _model_source(name_or_path: str | Path | None) -> str:
    """A hub name, or a folder that holds a model."""
    if name_or_path is None:
        return str(DEFAULT_MODEL)
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path must be a folder or a hub name, got {type(name_or_path).__name__}")
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name and folder.is_file():
        raise OSError(f"{name!r} is a file: give the folder that holds the model, with its config.json")
    if name and folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise _Source(name).refuse(_ADAPTER)
        if not (folder / "config.json").is_file():
            inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f"; there is one in {str(folder / inside[0])!r}" if len(inside) == 1 else ""
            raise OSError(f"no model in folder {name!r}: it has no config.json{hint}")
        return str(folder)
    if isinstance(name_or_path, Path) or not name or name.startswith(("/", ".", "~", "\\")) or name.count("/") > 1:
        raise OSError(f"there is no folder {name!r} to load a model from")
    return name


def _device(asked: str | torch.device | None) -> torch.device:
    """Where to run; the best there is where nothing was asked for."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ValueError(f'device must be "cpu", "cuda", "cuda:1" or the like, got {asked!r}') from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RuntimeError(f"there is no device {str(device)!r} here: torch sees {count} CUDA GPUs")
    return device


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is not None and found not in _FLOATS.values():
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {asked!r}")
    return found


def _stored(config: Any, weights: Mapping[str, Any]) -> torch.dtype:
    if config.dtype in _FLOATS.values():
        return config.dtype
    found = (_FLOATS.get(weight.get_dtype()) for weight in weights.values())
    return next((dtype for dtype in found if dtype is not None), torch.float32)


# what is in the files

_ADAPTER = (
    "it is an adapter (adapter_config.json), not a model: load it with peft, merge it into its model "
    "(model.merge_and_unload()), and save that with save_pretrained"
)


_KINDS: dict[str, tuple[Any, str]] = {
    "auto_map": ((dict, list), "an object"),  # a list in old tokenizers
    "quantization_config": (dict, "an object"),
    "tokenizer_class": (str, "the name of a class"),
    "image_processor_type": (str, "the name of a class"),
    "dtype": ((str, torch.dtype), 'the name of a dtype, such as "float32"'),
    "torch_dtype": ((str, torch.dtype), 'the name of a dtype, such as "float32"'),
}


def _config(source: _Source) -> Any:
    """What config.json says, checked as far as this package goes by it."""
    with _errors_of(source, "its config.json"):
        if source.folder is None and source.optional_file("adapter_config.json") is not None:
            raise source.refuse(_ADAPTER)
        try:
            config = AutoConfig.from_pretrained(source.name, **source.options)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            fields, _ = transformers.PreTrainedConfig.get_config_dict(source.name, revision=source.revision)
            _check_kinds(source, "its config.json", fields)
            raise _naming_field(source, error, fields, lambda rest: AutoConfig.for_model(**rest)) from error
    _check_kinds(source, "its config.json", vars(config))
    if getattr(config, "quantization_config", None) is not None:
        raise source.refuse(
            "its weights are quantised (quantization_config in its config.json): take the model it was made from, or "
            "dequantise it (model.dequantize()) and save that with save_pretrained"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise source.refuse(
            f"architectures in its config.json must be a list of class names, such as {['BertModel']}, got {names!r}"
        )
    # the attention is this package's own; a name in a file could also fetch code from the hub
    config._attn_implementation = None
    return config


def _check_kinds(source: _Source, file: str, fields: Any) -> None:
    """Refuse what transformers takes on trust."""
    for name, (kinds, said) in _KINDS.items():
        value = fields.get(name) if isinstance(fields, Mapping) else None
        if value is not None and not isinstance(value, kinds):
            raise source.refuse(f"{name} in {file} must be {said}, got {value!r:.80}")


def _check_sizes(source: _Source, config: Any) -> None:
    """Refuse sizes with which a model can be built but not run."""

    def refuse(name: str, value: Any, must: str) -> LoadingError:
        return source.refuse(f"{name} in its config.json cannot be {value!r:.80}: it must be {must}")

    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if type(chunk) is not int or chunk < 0:
        raise refuse("chunk_size_feed_forward", chunk, "a whole number of at least 0")
    for name in ("hidden_size", "vocab_size", "num_attention_heads"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise refuse(name, value, "a positive whole number")
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    free = any(hasattr(config, name) for name in ("head_dim", "d_kv"))
    if not free and isinstance(heads, int) and isinstance(size, int) and size % heads:
        raise refuse("num_attention_heads", heads, f"a divisor of hidden_size, {size}")


def _naming_field(source: _Source, error: Exception, fields: Any, build: Callable[[dict[str, Any]], Any]) -> Exception:
    """The error of `build` with the one field of config.json that it is about: without that field there is none."""

    def fails(left_out: str | None) -> bool:
        try:
            build({name: value for name, value in fields.items() if name != left_out})
        except Exception:
            return True
        return False

    if isinstance(fields, dict) and fails(None):
        wrong = next((name for name in fields if name != "model_type" and not fails(name)), None)
        if wrong is not None:
            return source.refuse(f"{wrong} in its config.json cannot be {fields[wrong]!r:.80}: {sentence_of(error)}")
    return error


def _open_weights(source: _Source, config: Any, files: contextlib.ExitStack) -> dict[str, Any]:
    """The weights by name, read when they are needed; only from safetensors files, and only from the model's own."""
    asked = getattr(config, "transformers_weights", None)
    named = [_WEIGHTS, _INDEX] if asked is None else [_own_file(source, "its config.json", asked, index=True)]
    found = next((path for path in map(source.optional_file, named) if path is not None), None)
    revision = source.revision or "main"
    if found is None and source.folder is None and revision == "main" and not huggingface_hub.constants.HF_HUB_OFFLINE:
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_commit_hash": None}
        made, revision, _ = auto_conversion(source.name, revision=revision, **options)
        found = None if made is None else Path(made)
    if found is None:
        lacking = f"it has no {' or '.join(named)}"
        there = [] if source.folder is None else sorted(path.name for path in source.folder.iterdir())
        readable = [name for name in there if name.endswith(".safetensors")]
        if len(readable) == 1 and asked is None:
            raise source.refuse(f"{lacking}; it has {readable[0]}: rename it to {_WEIGHTS}")
        if readable:
            raise source.refuse(f"{lacking}; it has {_some(readable)}: save the model once more with save_pretrained")
        other = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"))]
        raise source.refuse(
            f"{lacking}; weights are read from safetensors only"
            + (f", not from {other[0]}: save the model once more with save_pretrained" if other else "")
        )
    weights: dict[str, Any] = {}
    for name, path in _shards(source, found, revision).items():
        with _errors_of(source, name):
            file = files.enter_context(safe_open(path, framework="pt"))
            weights.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118
    return weights


def _own_file(source: _Source, where: str, name: Any, index: bool = False) -> str:
    """A name of a weights file in the model's own folder, as `where` gives it."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else []
    endings = (".safetensors", ".safetensors.index.json") if index else ".safetensors"
    if not parts or not name.endswith(endings):
        raise source.refuse(f"{where} names {name!r} as a file of weights; weights are read from safetensors only")
    if any(part in ("", ".", "..") or ":" in part for part in parts):
        raise source.refuse(f"{where} names {name!r} as a file of weights, which is outside the model's folder")
    return name


def _shards(source: _Source, found: Path, revision: str) -> dict[str, Path]:
    """The files of a model by name: one, or those of an index."""
    if not found.name.endswith(".index.json"):
        return {found.name: found}
    with _errors_of(source, found.name):
        places = json.loads(found.read_text(encoding="utf-8"))
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places:
        raise source.refuse(f"{found.name} has no weight_map, which says where every weight is")
    shards: dict[str, Path] = {}
    for name in places.values():
        if not isinstance(name, str) or name not in shards:
            own = _own_file(source, found.name, name)
            if source.folder is None:
                shards[own] = Path(str(hub.cached_file(source.name, own, revision=revision)))
            elif not (source.folder / own).is_file():
                raise source.refuse(f"{found.name} names the file {own!r}, which is not there")
            else:
                shards[own] = source.folder / own
    return shards


# which class


def _encoder_of(config: Any) -> tuple[type, Any]:
    """The class of a checkpoint's encoder alone, and its configuration: of CLIP and SigLIP the vision tower, of T5 the
    encoder without its decoder."""
    if config.model_type in _TOWERS:
        return getattr(transformers, _TOWERS[config.model_type]), config.vision_config
    auto: Any = transformers.AutoModel
    if config.model_type in {family.model_type for family in supported_encoders()}:
        config.is_encoder_decoder = False  # as T5's encoder writes it when it is saved alone
        if _has_decoders(config):
            auto = transformers.AutoModelForTextEncoding
    found = auto._model_mapping.get(type(config), PreTrainedModel)
    return found[0] if isinstance(found, tuple) else found, config


def _has_decoders(config: Any) -> bool:
    """Whether transformers has encoder-decoders of this kind."""
    return type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping


def _classes(config: Any, *autos: Any) -> dict[str, type]:
    """Classes for this kind of configuration by name, transformers' own and registered ones."""
    found: dict[str, type] = {}
    for auto in autos or [auto for auto in vars(modeling_auto).values() if getattr(auto, "_model_mapping", None)]:
        classes = auto._model_mapping.get(type(config), ())
        for each in classes if isinstance(classes, tuple) else (classes,):
            found[each.__name__] = each
    return found


def _named(source: _Source, config: Any, parts: Any) -> type | None:
    """The class that config.json names first; None where it names none, or one that nobody here has.

    `parts`: the configuration of the encoder inside, where that is another one.
    """
    name = next(iter(config.architectures or ()), None)
    code = getattr(config, "auto_map", None)
    code = {auto: ref for auto, ref in code.items() if isinstance(ref, str)} if isinstance(code, dict) else {}
    own = next((ref for ref in code.values() if name is not None and ref.rpartition(".")[2] == name), None)
    if source.trust_remote_code and (own or "AutoModel" in code):
        with _errors_of(source, "its code"):
            return get_class_from_dynamic_module(own or code["AutoModel"], source.name, revision=source.revision)
    if name is None:
        return None
    known = _classes(config) | _classes(parts)
    found = known.get(name) or getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)) or found.forward is nn.Module.forward:
        if own is not None:
            raise source.refuse_code()
        return None
    if name in known or found.config_class in (type(config), type(parts)):
        return found
    kind = re.search("(For[A-Z]|LMHead|Encoder|Model)[A-Za-z]*$", name)
    for other, each in known.items():  # XLM-RoBERTa and CamemBERT are RoBERTa under other names
        if kind and other.endswith(kind[0]) and getattr(each, "base_model_prefix", "") == found.base_model_prefix:
            return each
    raise source.refuse(
        f"its config.json contradicts itself: model_type is {config.model_type!r}, and architectures names {name}"
    )


def _on_meta(model_class: Any, config: Any) -> Any:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


@dataclass(frozen=True)
class _Skeleton:
    """What a class would hold, without memory for it: shapes by names inside the encoder."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Collection[str]
    decodes: bool

    @classmethod
    def of(cls, model_class: Any, config: Any) -> _Skeleton:
        try:
            model = _on_meta(model_class, config)
        except Exception:  # a class that this configuration is not for
            return cls({}, (), False)
        prefix = model.base_model_prefix
        return cls(
            {_bare(key, prefix): tuple(weight.shape) for key, weight in model.state_dict().items()},
            {_bare(key, prefix) for key in getattr(model, "all_tied_weights_keys", ())},
            any(hasattr(part, "decoder") for part in (model, model.base_model)),
        )


def _bare(key: str, prefix: str) -> str:
    """A weight's name inside the encoder alone."""
    return key.removeprefix(f"{prefix}.")


@dataclass(frozen=True)
class _Checkpoint:
    """All there is of a model before it is one: what config.json says, of the whole and of the encoder inside, the
    class of the encoder alone, and the weights."""

    source: _Source
    whole: Any
    config: Any
    encoder: type
    weights: Mapping[str, Any]
    dtype: torch.dtype

    def model(self) -> tuple[Any, str | None]:
        """The model with the head that it was saved with, and what has to be said of weights that it leaves out.

        Raises:
            LoadingError: weights are missing, of other shapes, or there are more than the model has a place for.
        """
        source, name = self.source, next(iter(self.whole.architectures or ()), None)
        named = _named(source, self.whole, self.config)
        usable = named is not None and self._is_usable(named)
        chosen: Any = named if usable else self.encoder
        try:
            model, left, absent = self.filled(chosen)
        except _HeadError:
            if not _PRETRAINING.search(chosen.__name__):
                raise
            chosen = named = self.encoder
            model, left, absent = self.filled(chosen)
        plain = _classes(self.whole, transformers.AutoModel, transformers.AutoModelForSeq2SeqLM)
        if named is not None and not usable:
            said = f"model {source.name!r}: only the encoder of {name} is taken: there are scores, but no answer"
            return model, None if name in plain else said
        apart = self.config is not self.whole or _has_decoders(self.whole)
        for each in plain.values() if apart and left else ():  # decoders and text towers are left out on purpose
            left = [key for key in left if key not in _Skeleton.of(each, self.whole).shapes]
        if not left:
            return model, None
        held = f"its files hold weights that {chosen.__name__} has no place for ({_some(left)})"
        fitting, known = ([], False) if apart else self._heads(model, left, absent)
        write = " or ".join(f'"architectures": ["{each}"]' for each in fitting)
        if named is None and name is not None:
            raise source.refuse(
                f"{held}, and its config.json names a class for them that transformers does not have, {name}: "
                + (f"write {write} into it, if that is the same, or " if fitting else "")
                + "load it by its own class, GlobEnc(model, tokenizer)"
            )
        if named is None and len(fitting) > 1:
            raise source.refuse(f"{held}, and its config.json names no class that does: write {write} into it")
        if named is None and fitting:
            return self.filled(_classes(self.whole)[fitting[0]])[0], None
        if named is None or named is self.encoder or not known:
            said = f"model {source.name!r}: {held}, so they are left out"
            return model, said + (f"; if they are wanted, write {write} into config.json" if fitting else "")
        return model, None

    def _is_usable(self, named: Any) -> bool:
        """Whether the class as a whole reads one text, or one picture, with an encoder."""
        if named.__name__ in _classes(self.whole, transformers.AutoModelForMultipleChoice):
            return False
        if self.config is not self.whole:
            return named.config_class is type(self.config)
        return not (_has_decoders(self.whole) and _Skeleton.of(named, self.whole).decodes)

    def _heads(self, model: Any, left: list[str], absent: Collection[str]) -> tuple[list[str], bool]:
        """The classes that have a place for all of `left` and lack nothing, not even what is `absent` from the
        encoder; whether `left` is known to any classes."""
        prefix = model.base_model_prefix
        have = {_bare(key, prefix): tuple(v.shape) for key, v in model.state_dict().items() if key not in absent}
        have |= {_bare(key, prefix): tuple(v.get_shape()) for key, v in self.weights.items()}
        unknown = set(left)
        fitting: list[str] = []
        alike: list[str] = []  # but for shapes
        decoders = _classes(self.whole, transformers.AutoModelForCausalLM)
        for name, each in _classes(self.whole).items():
            if name in decoders:
                continue
            head = _Skeleton.of(each, self.whole)
            unknown -= head.shapes.keys()
            needed = {key: shape for key, shape in head.shapes.items() if key not in head.tied}
            if head.shapes.keys() >= set(left) and needed.keys() <= have.keys():
                (fitting if needed.items() <= have.items() else alike).append(name)
        return fitting or alike, not unknown

    def filled(self, model_class: Any) -> tuple[Any, list[str], set[str]]:
        """A model of that class with all weights that it needs; the names of those that it has no place for, and of
        those that it does without."""
        with _errors_of(self.source, f"{model_class.__name__} of its config.json"), _quiet():
            try:
                self._refuse_quantised(model_class)
                model, info = model_class.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=dict(self.weights),
                    dtype=self.dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # said below
                )
            except (LoadingError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                self._refuse_sizes(model_class)
                fields = self.config.to_diff_dict()
                kind = type(self.config)
                raise _naming_field(
                    self.source, error, fields, lambda rest: _on_meta(model_class, kind.from_dict(rest))
                ) from error
        model.config.name_or_path = self.source.name
        missing = [key for key in model.state_dict() if key in info["missing_keys"]]
        left = [key for key in sorted(info["unexpected_keys"]) if self._is_weight(key, model.base_model_prefix)]
        foreign = [key for key in left if _is_part(model, key)]
        unused = _unused(model, missing) if missing else set()
        missing = [key for key in missing if key not in unused]
        if missing:
            refusal = self.source.refuse(
                f"{len(missing)} of the weights of {model_class.__name__} are missing, {_some(missing)}: "
                f"{_why_missing(model, missing, left)}"
            )
            raise _HeadError(*refusal.args) if _is_head(model, missing) else refusal
        for key, stored, wanted in sorted(info["mismatched_keys"]):
            head = _bare(key, model.base_model_prefix).split(".")[0] not in _body(model)
            raise self.source.refuse(
                f"{key} is {list(stored)} in its files, and {list(wanted)} by its config.json, whose "
                + (f"id2label has {model.config.num_labels} labels" if head else _field(self.config, stored, wanted))
            )
        if foreign:
            raise self.source.refuse(
                f"{len(foreign)} of its weights have no place in {model_class.__name__} by its config.json, "
                f"{_some(foreign)}: {_why_foreign(model, foreign)}"
            )
        return model, [_bare(key, model.base_model_prefix) for key in left], unused

    def _refuse_sizes(self, model_class: Any) -> None:
        """Sizes by config.json that are not those of the files, where a model of them is more than fits anywhere."""
        shapes = _Skeleton.of(model_class, self.config).shapes
        for key, weight in self.weights.items():
            stored, wanted = weight.get_shape(), shapes.get(_bare(key, model_class.base_model_prefix))
            if wanted is not None and list(wanted) != stored:
                raise self.source.refuse(
                    f"{key} is {stored} in its files, and {list(wanted)} by its config.json, whose "
                    + _field(self.config, stored, wanted)
                )

    def _refuse_quantised(self, model_class: Any) -> None:
        """Whole numbers in place of a parameter; a buffer may hold them."""
        whole = {key: dtype for key, weight in self.weights.items() if (dtype := weight.get_dtype()) not in _FLOATS}
        if not whole:
            return
        prefix = model_class.base_model_prefix
        parameters = {_bare(name, prefix) for name, _ in _on_meta(model_class, self.config).named_parameters()}
        for key, dtype in whole.items():
            if _bare(key, prefix) in parameters or key.endswith(".qweight"):
                raise self.source.refuse(
                    f"its weights are quantised ({key} is {dtype}): take the model it was made from"
                )

    def _is_weight(self, key: str, prefix: str) -> bool:
        """Whether it is more than ids of positions and the like, in the files under this name or without prefix."""
        bare = _bare(key, prefix)
        stored = next((self.weights[name] for name in (key, bare, f"{prefix}.{bare}") if name in self.weights), None)
        return stored is None or stored.get_dtype() in _FLOATS


def _is_part(model: Any, key: str) -> bool:
    """Whether a weight that the model has no place for belongs inside a part of its encoder."""
    first, *more = _bare(key, model.base_model_prefix).split(".")
    # a mask token stands for patches that are hidden in pretraining
    return bool(more) and more[-1] != "mask_token" and first in dict(model.base_model.named_children())


# whether all is there


def _unused(model: Any, missing: list[str]) -> set[str]:
    """Those of the missing weights that neither a layer of the encoder holds nor the answer depends on."""
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in missing}
    try:
        family = find_family(model)
        held = {id(p) for layer in layer_list(model.base_model, family) for p in layer.parameters()}
        free = {name: p for name, p in parameters.items() if id(p) not in held}
        loan = Loan()

        def run() -> Any:
            change = family.prepare(model.base_model, 4) if family.prepare else None
            if change is not None:
                loan.change(*change)
            with torch.enable_grad():
                answer = model.eval()(**_smallest_input(model, family.patches is not None), return_dict=True)
                total: Any = sum(value.double().sum() for value in _tensors(answer) if value.requires_grad)
                return torch.autograd.grad(total, list(free.values()), allow_unused=True)

        slopes = loan.run(run)
    except Exception:  # a model that does not run is somebody else's to explain; nothing is known to be unused
        return set()
    return {name for name, slope in zip(free, slopes, strict=True) if slope is None}


def _smallest_input(model: Any, pictures: bool) -> dict[str, Tensor]:
    config = model.config
    if pictures:
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width, dtype=model.dtype)}
    special = {getattr(config, name, None) for name in ("pad_token_id", "mask_token_id")}
    return {"input_ids": torch.tensor([[k for k in range(config.vocab_size) if k not in special][:4]])}


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, but the pooled vector that no head reads."""
    for name, value in output.items():
        several = value if isinstance(value, tuple | list) else (value,)
        if name != "pooler_output":
            yield from (each for each in several if isinstance(each, Tensor))


def _why_missing(model: Any, missing: list[str], left: list[str]) -> str:
    """The likely reason, from the names of weights that are missing and of those that are left."""
    if any("lora_" in key for key in left):
        return "it holds an adapter: merge it into the model (peft: model.merge_and_unload()) before saving"
    extra = _renamed(left, model.state_dict(), model.base_model_prefix)
    if extra is not None:
        return f"names in its files have {extra!r} too much, from what the model was wrapped in when it was saved"
    lacking = _renamed(missing, set(left), model.base_model_prefix)
    if lacking is not None:
        return f"names in its files lack {lacking!r}: only a part of the model was saved"
    if _is_head(model, missing):
        # the encoder of a head is often made without the pooler that it has alone
        alone = _Skeleton.of(type(model.base_model), model.config).shapes
        others = [key for key in left if _bare(key, model.base_model_prefix) not in alone]
        if others:
            return f"they belong to its head, and its files hold another one, {_some(others)}"
        return (
            "they belong to its head, and its files hold an encoder without it: load a fine-tuned model, or write "
            f'"architectures": ["{type(model.base_model).__name__}"] into its config.json for scores without an answer'
        )
    layers = sorted({int(found[0]) for key in missing if (found := re.search(r"(?<=\.)\d+(?=\.)", key))})
    if layers and all(re.search(r"\.\d+\.", key) for key in missing):
        return (
            f"they belong to layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}; num_hidden_layers in "
            f"its config.json is {model.config.num_hidden_layers}"
        )
    return "its files are not whole, or not of this config.json"


def _is_head(model: Any, names: Iterable[str]) -> bool:
    """Whether none of these weights belongs to the encoder's layers or embeddings."""
    inside = (_bare(key, model.base_model_prefix).split(".")[0] for key in names)
    return model.base_model is not model and _body(model).isdisjoint(inside)


def _body(model: Any) -> set[str]:
    """The parts of the base model that hold its layers and its embeddings."""
    embeddings = model.base_model.get_input_embeddings()
    inside = [*layer_list(model.base_model, find_family(model)), embeddings]
    parts = model.base_model.named_children()
    return {name for name, part in parts if any(each is module for each in part.modules() for module in inside)}


def _renamed(names: Iterable[str], wanted: Collection[str], prefix: str) -> str | None:
    """What most names have too much to be wanted ones; None if nothing explains most of them."""
    names = list(names)
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        ranges = ((i, j) for j in range(1, len(parts)) for i in range(j))
        for i, j in sorted(ranges, key=lambda ij: ij[1] - ij[0]):
            rest = ".".join(parts[:i] + parts[j:])
            if rest in wanted or f"{prefix}.{rest}" in wanted or _bare(rest, prefix) in wanted:
                found[".".join(parts[i:j]) + "."] += 1
                break
    ((extra, count),) = found.most_common(1) or [("", 0)]
    return extra if 2 * count > len(names) else None


def _why_foreign(model: Any, foreign: list[str]) -> str:
    layers = re.search(r"\.(\d+)\.", foreign[0])
    if layers and int(layers[1]) >= model.config.num_hidden_layers:
        return f"num_hidden_layers in its config.json is {model.config.num_hidden_layers}"
    return "the model that was saved computes something that this one does not"


def _field(config: Any, stored: Iterable[int], wanted: Iterable[int]) -> str:
    """The fields of config.json that may be wrong, where a size differs."""
    sizes = [want for have, want in zip(stored, wanted, strict=False) if have != want]
    fields = [f"{name} is {value}" for name, value in config.to_dict().items() if type(value) is int and value in sizes]
    return " and ".join(fields) or "sizes are others"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


# what others say


_said_by_us: ContextVar[bool] = ContextVar("said_by_us", default=False)


class _ReportFilter(logging.Filter):
    """Without transformers' table of missing weights and its word on tied ones, where those are looked at here."""

    def filter(self, record: logging.LogRecord) -> bool:
        about = ("LOAD REPORT", "The tied weights mapping")
        return not (_said_by_us.get() and any(words in str(record.msg) for words in about))


_report_filter = _ReportFilter()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no table of transformers' in this thread while it fills a model; other threads keep theirs."""
    logging.getLogger("transformers.modeling_utils").addFilter(_report_filter)
    earlier = transformers_logging._tqdm_hook
    if not isinstance(earlier, _BarHook):
        transformers_logging.set_tqdm_hook(_BarHook(earlier))
    token = _said_by_us.set(True)
    try:
        yield
    finally:
        _said_by_us.reset(token)


class _BarHook:
    """No progress bar where `_said_by_us`; else what was there before."""

    def __init__(self, earlier: Any):
        self._earlier = earlier

    def __call__(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _said_by_us.get():
            return transformers_logging.EmptyTqdm(*args, **kwargs)
        return factory(*args, **kwargs) if self._earlier is None else self._earlier(factory, args, kwargs)


@contextlib.contextmanager
def _errors_of(source: _Source, part: str, files: Iterable[str] = ()) -> Iterator[None]:
    """Whatever goes wrong in other packages as one sentence that names the model and the part of it.

    `files`: JSON files that it may be about.
    """
    try:
        yield
    except (LoadingError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # tokenizers' panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if "trust_remote_code" in str(error):
            raise source.refuse_code() from error
        if source.folder is None and isinstance(error, OSError):
            raise LoadingError(
                f"model {source.name!r} is no folder here and could not be fetched from the Hugging Face hub: "
                f"{sentence_of(error)}"
            ) from error
        bad = next((file for file in files if source.folder and not _is_json_object(source.folder / file)), None)
        raise source.refuse(f"{part if bad is None else bad}: {sentence_of(error)}") from error


def _is_json_object(path: Path) -> bool:
    try:
        return not path.is_file() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def sentence_of(error: BaseException) -> str:
    """An error of another package's in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else ""
    if said.endswith(":") and len(lines) > 1:
        said += f" {lines[1]}"
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    if type(error).__module__ == "builtins" and not plain:
        said = f"{type(error).__name__}: {said}"
    return said[:400] or type(error).__name__
