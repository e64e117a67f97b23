"""Why weights are missing or too many, from their names and from the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..encoders import find_family, layer_list
from ..model_state import Loan
from .classes import Skeleton, without_prefix
from .files import first_names


def is_inside_encoder(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight that the model has no place for belongs inside a part of its encoder."""
    first, *more = without_prefix(key, model.base_model_prefix).split(".")
    # a mask token stands for patches that are hidden in pretraining
    return bool(more) and more[-1] != "mask_token" and first in dict(model.base_model.named_children())


def unused_weights(model: PreTrainedModel, missing: list[str]) -> set[str]:
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
                answer = model.eval()(**_smallest_input(model, family.reads_images), return_dict=True)
                total: Any = sum(value.double().sum() for value in _tensors(answer) if value.requires_grad)
                return torch.autograd.grad(total, list(free.values()), allow_unused=True)

        slopes = loan.run(run)
    except Exception:  # a model that does not run is refused elsewhere, with the reason
        return set()
    return {name for name, slope in zip(free, slopes, strict=True) if slope is None}


def _smallest_input(model: PreTrainedModel, reads_images: bool) -> dict[str, Tensor]:
    config = model.config
    if reads_images:
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


def why_missing(model: PreTrainedModel, missing: list[str], left: list[str]) -> str:
    """The likely reason, from the names of weights that are missing and of those that are left."""
    if any("lora_" in key for key in left):
        return "it holds an adapter: merge it into the model (peft: model.merge_and_unload()) before saving"
    extra = _renamed(left, model.state_dict(), model.base_model_prefix)
    if extra is not None:
        return f"names in its files have {extra!r} too much, from what the model was wrapped in when it was saved"
    lacking = _renamed(missing, set(left), model.base_model_prefix)
    if lacking is not None:
        return f"names in its files lack {lacking!r}: only a part of the model was saved"
    if is_head(model, missing):
        # the encoder of a head is often made without the pooler that it has alone
        encoder: Any = type(model.base_model)
        alone = Skeleton.of(encoder, model.config).shapes
        others = [key for key in left if without_prefix(key, model.base_model_prefix) not in alone]
        if others:
            return f"they belong to its head, and its files hold another one, {first_names(others)}"
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


def is_head(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether none of these weights belongs to the encoder's layers or embeddings."""
    inside = (without_prefix(key, model.base_model_prefix).split(".")[0] for key in names)
    return model.base_model is not model and encoder_parts(model).isdisjoint(inside)


def encoder_parts(model: PreTrainedModel) -> set[str]:
    """The parts of the base model that hold its layers and its embeddings."""
    encoder: Any = model.base_model
    inside = [*layer_list(encoder, find_family(model)), encoder.get_input_embeddings()]
    parts = encoder.named_children()
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
            if rest in wanted or f"{prefix}.{rest}" in wanted or without_prefix(rest, prefix) in wanted:
                found[".".join(parts[i:j]) + "."] += 1
                break
    ((extra, count),) = found.most_common(1) or [("", 0)]
    return extra if 2 * count > len(names) else None


def why_foreign(model: PreTrainedModel, foreign: list[str]) -> str:
    layers = re.search(r"\.(\d+)\.", foreign[0])
    if layers and int(layers[1]) >= model.config.num_hidden_layers:
        return f"num_hidden_layers in its config.json is {model.config.num_hidden_layers}"
    return "the model that was saved computes something that this one does not"


def wrong_fields(config: PreTrainedConfig, stored: Iterable[int], wanted: Iterable[int]) -> str:
    """The fields of config.json that may be wrong, where a size differs."""
    sizes = [want for have, want in zip(stored, wanted, strict=False) if have != want]
    fields = [f"{name} is {value}" for name, value in config.to_dict().items() if type(value) is int and value in sizes]
    return " and ".join(fields) or "sizes are others"
