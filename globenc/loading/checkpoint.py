"""A model made from its configuration and weights, and checked against them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .classes import Skeleton, classes_of, has_decoders, named_class, on_meta, without_prefix
from .config import naming_field
from .files import LoadingError, MissingHeadError, ModelFiles, errors_of, first_names
from .quiet import quiet
from .reasons import encoder_parts, is_head, is_inside_encoder, unused_weights, why_foreign, why_missing, wrong_fields
from .source import FLOATS

# heads of pretraining, which classify no text or image; an encoder saved alone has their names in its config.json
_PRETRAINING = re.compile("For(Masked[A-Z]|PreTraining|CausalLM)|LMHead")


@dataclass(frozen=True)
class _Filled:
    """A model with its weights, compared with its files.

    Attributes:
        model: the model; nothing that its answer depends on is missing.
        unexpected: names of stored weights that it has no place for, as they are inside the encoder.
        unused: names of its weights that the files lack, and that its answer does not depend on.
    """

    model: PreTrainedModel
    unexpected: list[str]
    unused: set[str]


@dataclass(frozen=True)
class Checkpoint:
    """What a model is made of.

    Attributes:
        files: where it is.
        whole: its config.json.
        config: the configuration of the encoder inside; `whole` itself but for CLIP and SigLIP.
        encoder: the class of the encoder alone.
        weights: slices of safetensors files, by name.
        dtype: that the model is to have.
    """

    files: ModelFiles
    whole: PreTrainedConfig
    config: PreTrainedConfig
    encoder: type[PreTrainedModel]
    weights: Mapping[str, Any]
    dtype: torch.dtype

    def model(self) -> tuple[PreTrainedModel, str | None]:
        """The model with the head that it was saved with, and a warning where stored weights or a head are left out.

        Raises:
            LoadingError: weights are missing, of other shapes, or there are more than the model has a place for.
        """
        files, name = self.files, next(iter(self.whole.architectures or ()), None)
        named = named_class(files, self.whole, self.config)
        usable = named is not None and self._is_usable(named)
        chosen: Any = named if usable else self.encoder
        try:
            filled = self._filled(chosen)
        except MissingHeadError:
            if not _PRETRAINING.search(chosen.__name__):
                raise
            chosen = named = self.encoder
            filled = self._filled(chosen)
        encoders = classes_of(self.whole, transformers.AutoModel, transformers.AutoModelForSeq2SeqLM)
        if named is not None and not usable:
            warning = f"model {files.name!r}: only the encoder of {name} is taken: there are scores, but no answer"
            return filled.model, None if name in encoders else warning
        is_part = self.config is not self.whole or has_decoders(self.whole)
        unexpected = filled.unexpected
        for each in (
            encoders.values() if is_part and unexpected else ()
        ):  # a decoder or text tower is left out on purpose
            unexpected = [key for key in unexpected if key not in Skeleton.of(each, self.whole).shapes]
        if not unexpected:
            return filled.model, None
        fact = f"its files hold weights that {chosen.__name__} has no place for ({first_names(unexpected)})"
        fitting, known = ([], False) if is_part else self._heads(filled.model, unexpected, filled.unused)
        write = " or ".join(f'"architectures": ["{each}"]' for each in fitting)
        if named is None and name is not None:
            raise files.refuse(
                f"{fact}, and its config.json names a class for them that transformers does not have, {name}: "
                + (f"write {write} into it, if that is the same, or " if fitting else "")
                + "load it by its own class, GlobEnc(model, tokenizer)"
            )
        if named is None and len(fitting) > 1:
            raise files.refuse(f"{fact}, and its config.json names no class that does: write {write} into it")
        if named is None and fitting:
            return self._filled(classes_of(self.whole)[fitting[0]]).model, None
        if named is None or named is self.encoder or not known:
            warning = f"model {files.name!r}: {fact}, so they are left out"
            return filled.model, warning + (f"; if they are wanted, write {write} into config.json" if fitting else "")
        return filled.model, None

    def _is_usable(self, named: type[PreTrainedModel]) -> bool:
        """Whether the class as a whole reads one text, or one image, with an encoder."""
        if named.__name__ in classes_of(self.whole, transformers.AutoModelForMultipleChoice):
            return False
        if self.config is not self.whole:
            return named.config_class is type(self.config)
        return not (has_decoders(self.whole) and Skeleton.of(named, self.whole).decodes)

    def _heads(self, model: PreTrainedModel, unexpected: list[str], absent: Collection[str]) -> tuple[list[str], bool]:
        """Names of the classes that have a place for all `unexpected` weights and lack nothing, not even those `absent`
        from the encoder; and whether every unexpected weight is known to some class."""
        prefix = model.base_model_prefix
        have = {
            without_prefix(key, prefix): tuple(v.shape) for key, v in model.state_dict().items() if key not in absent
        }
        have |= {without_prefix(key, prefix): tuple(v.get_shape()) for key, v in self.weights.items()}
        unknown = set(unexpected)
        fitting: list[str] = []
        alike: list[str] = []  # but for shapes
        decoders = classes_of(self.whole, transformers.AutoModelForCausalLM)
        for name, each in classes_of(self.whole).items():
            if name in decoders:
                continue
            head = Skeleton.of(each, self.whole)
            unknown -= head.shapes.keys()
            needed = {key: shape for key, shape in head.shapes.items() if key not in head.tied}
            if head.shapes.keys() >= set(unexpected) and needed.keys() <= have.keys():
                (fitting if needed.items() <= have.items() else alike).append(name)
        return fitting or alike, not unknown

    def _filled(self, model_class: type[PreTrainedModel]) -> _Filled:
        """A model of that class with all weights that it needs; raises LoadingError as `model`."""
        model, info = self._instantiate(model_class)
        model.config.name_or_path = self.files.name
        prefix = model.base_model_prefix
        missing = [key for key in model.state_dict() if key in info["missing_keys"]]
        unexpected = [key for key in sorted(info["unexpected_keys"]) if self._is_weight(key, prefix)]
        unused = unused_weights(model, missing) if missing else set()
        missing = [key for key in missing if key not in unused]
        if missing:
            refusal = self.files.refuse(
                f"{len(missing)} of the weights of {model_class.__name__} are missing, {first_names(missing)}: "
                f"{why_missing(model, missing, unexpected)}"
            )
            raise MissingHeadError(*refusal.args) if is_head(model, missing) else refusal
        for key, stored, wanted in sorted(info["mismatched_keys"]):
            if without_prefix(key, prefix).split(".")[0] in encoder_parts(model):
                raise self._other_shape(key, stored, wanted, wrong_fields(self.config, stored, wanted))
            raise self._other_shape(key, stored, wanted, f"id2label has {model.config.num_labels} labels")
        foreign = [key for key in unexpected if is_inside_encoder(model, key)]
        if foreign:
            raise self.files.refuse(
                f"{len(foreign)} of its weights have no place in {model_class.__name__} by its config.json, "
                f"{first_names(foreign)}: {why_foreign(model, foreign)}"
            )
        return _Filled(model, [without_prefix(key, prefix) for key in unexpected], unused)

    def _instantiate(self, model_class: type[PreTrainedModel]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A model of that class with the stored weights, and transformers' report of those that did not fit."""
        with errors_of(self.files, f"{model_class.__name__} of its config.json"), quiet():
            try:
                self._refuse_quantised(model_class)
                loaded: Any = model_class.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=dict(self.weights),
                    dtype=self.dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are in the report
                )
                return loaded
            except (LoadingError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                self._refuse_sizes(model_class)
                fields = self.config.to_diff_dict()
                kind = type(self.config)
                raise naming_field(
                    self.files, error, fields, lambda rest: on_meta(model_class, kind.from_dict(rest))
                ) from error

    def _other_shape(self, key: str, stored: Iterable[int], wanted: Iterable[int], fields: str) -> LoadingError:
        return self.files.refuse(
            f"{key} is {list(stored)} in its files, and {list(wanted)} by its config.json, whose {fields}"
        )

    def _refuse_sizes(self, model_class: type[PreTrainedModel]) -> None:
        """Sizes by config.json that are not those of the files, where a model of them is more than fits anywhere."""
        shapes = Skeleton.of(model_class, self.config).shapes
        for key, weight in self.weights.items():
            stored, wanted = weight.get_shape(), shapes.get(without_prefix(key, model_class.base_model_prefix))
            if wanted is not None and list(wanted) != stored:
                raise self._other_shape(key, stored, wanted, wrong_fields(self.config, stored, wanted))

    def _refuse_quantised(self, model_class: type[PreTrainedModel]) -> None:
        """Whole numbers in place of a parameter; a buffer may hold them."""
        whole = {key: dtype for key, weight in self.weights.items() if (dtype := weight.get_dtype()) not in FLOATS}
        if not whole:
            return
        prefix = model_class.base_model_prefix
        parameters = {without_prefix(name, prefix) for name, _ in on_meta(model_class, self.config).named_parameters()}
        for key, dtype in whole.items():
            if without_prefix(key, prefix) in parameters or key.endswith(".qweight"):
                raise self.files.refuse(
                    f"its weights are quantised ({key} is {dtype}): take the model it was made from"
                )

    def _is_weight(self, key: str, prefix: str) -> bool:
        """Whether it is more than ids of positions and the like, in the files under this name or without prefix."""
        bare = without_prefix(key, prefix)
        stored = next((self.weights[name] for name in (key, bare, f"{prefix}.{bare}") if name in self.weights), None)
        return stored is None or stored.get_dtype() in FLOATS
