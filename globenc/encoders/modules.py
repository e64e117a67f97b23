"""The modules of an encoder's layers, resolved from the names of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .family import CustomAttention, EncoderFamily


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer, resolved from its family's names.

    Attributes:
        module: the layer itself.
        attention, output_projection, attention_norm, output_norm, output_scale: as in `EncoderFamily`.
        custom_attention: of the family, with the modules its paths lead to, `value` and `weights`.
    """

    module: nn.Module
    attention: nn.Module
    output_projection: nn.Linear
    attention_norm: nn.Module
    output_norm: nn.Module | None
    output_scale: nn.Parameter | None = None
    custom_attention: CustomAttention | None = None
    value: nn.Module | None = None
    weights: nn.Module | None = None

    @property
    def block(self) -> nn.Module | None:
        """The module whose first argument is the residual: a pre-LN layer itself; None where that is the attention."""
        return self.module if self.output_norm is None else None

    @property
    def norms(self) -> tuple[Any, ...]:
        """The LayerNorms that a contribution goes through; none in a pre-LN layer."""
        return () if self.output_norm is None else (self.attention_norm, self.output_norm)

    @property
    def output_weight(self) -> Tensor:
        """W_O, [d, H * d_h], what scales the attention block's output included."""
        weight = self.output_projection.weight.detach()
        return weight if self.output_scale is None else weight * self.output_scale.detach()[:, None]

    @property
    def output_bias(self) -> Tensor | None:
        """b_O, [d], scaled likewise."""
        bias = self.output_projection.bias
        if bias is None:
            return None
        return bias.detach() if self.output_scale is None else bias.detach() * self.output_scale.detach()


def norm_eps(norm: Any) -> float:
    """What a LayerNorm adds to the variance."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def norm_width(norm: Any) -> tuple[int, ...]:
    """The shape a LayerNorm normalises."""
    return tuple(norm.normalized_shape) if hasattr(norm, "normalized_shape") else tuple(norm.weight.shape)


def _is_layer_norm(norm: nn.Module) -> bool:
    # DeBERTa brings a LayerNorm of its own, with the same formula
    return isinstance(norm, nn.LayerNorm) or (hasattr(norm, "variance_epsilon") and hasattr(norm, "bias"))


def _resolve(root: nn.Module, path: str, argument: str, family: EncoderFamily) -> nn.Module:
    *others, last = path.split("|")
    for other in others:
        try:
            return root.get_submodule(other)
        except AttributeError:
            continue
    try:
        return root.get_submodule(last)
    except AttributeError as error:
        raise ValueError(
            f"encoder family {family.model_type!r}: {argument}={path!r} does not exist in "
            f"{type(root).__name__} ({error}); correct it with globenc.register_encoder"
        ) from None


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _kind(weight: object) -> str:
    if not isinstance(weight, Tensor):
        return "packed integers"
    return str(weight.dtype) if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__


def _is_quantised(module: nn.Module) -> bool:
    """Whether its weight is another than that of a linear layer in floating point: packed, a method, or of a kind of
    tensor that only looks like one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return callable(weight) or hasattr(module, "qweight") or "quant" in type(module).__module__
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return True
    return type(weight) not in (Tensor, nn.Parameter) and not type(weight).__module__.startswith("torch.distributed")


def layer_list(base_model: nn.Module, family: EncoderFamily) -> list[nn.Module]:
    """The layers in order of execution; raises ValueError where the family's `layers` does not exist."""
    if callable(family.layers):
        return list(family.layers(base_model))
    container = _resolve(base_model, family.layers, "layers", family)
    return list(container if isinstance(container, nn.ModuleList) else container.children())


def find_layers(base_model: nn.Module, family: EncoderFamily) -> tuple[LayerModules, ...]:
    """The modules of every layer in order of execution; a shared layer stands there once per use.

    Raises:
        ValueError: a name of the family does not exist in this model, or is of an unusable kind.
    """
    layers = tuple(_modules_of(layer, family) for layer in layer_list(base_model, family))
    if not layers:
        raise ValueError(f"model must have at least one encoder layer, got {type(base_model).__name__} with none")
    return layers


def _modules_of(layer: nn.Module, family: EncoderFamily) -> LayerModules:
    attention, projection, attention_norm = (
        _resolve(layer, getattr(family, argument), argument, family)
        for argument in ("attention", "output_projection", "attention_norm")
    )
    if _is_quantised(projection):
        raise ValueError(
            f"output_projection of {family.model_type!r} is quantised ({_full_name(projection)}, with a weight of "
            f"{_kind(getattr(projection, 'weight', None))}): load the model without quantisation, in float32, "
            "bfloat16 or float16"
        )
    if type(projection) is not nn.Linear:
        raise ValueError(
            f"output_projection of {family.model_type!r} must be a plain torch.nn.Linear, got "
            f"{_full_name(projection)}; merge adapters (peft: model.merge_and_unload())"
        )
    output_norm = None
    if family.output_norm is not None:
        output_norm = _resolve(layer, family.output_norm, "output_norm", family)
        _check_norms(attention_norm, output_norm, projection.out_features, family)
    custom, scale = family.custom_attention, family.output_scale
    return LayerModules(
        layer,
        attention,
        projection,
        attention_norm,
        output_norm,
        output_scale=None if scale is None else layer.get_parameter(scale),
        custom_attention=custom,
        value=None if custom is None or custom.value is None else _resolve(layer, custom.value, "value", family),
        weights=None
        if custom is None or custom.weights is None
        else _resolve(layer, custom.weights, "weights", family),
    )


def _check_norms(attention_norm: nn.Module, output_norm: nn.Module, width: int, family: EncoderFamily) -> None:
    """Raises ValueError where they are not the two LayerNorms over `width` numbers of a post-LN layer."""
    for argument, norm in (("attention_norm", attention_norm), ("output_norm", output_norm)):
        if not _is_layer_norm(norm):
            raise ValueError(
                f"{argument} of {family.model_type!r} must be a torch.nn.LayerNorm, got {type(norm).__name__}"
            )
        if norm_width(norm) != (width,):
            raise ValueError(
                f"{argument} of {family.model_type!r} must normalise what output_projection puts out: "
                f"{width} numbers, got {list(norm_width(norm))}"
            )
    if attention_norm is output_norm:
        raise ValueError(f"attention_norm and output_norm of {family.model_type!r} must be two modules, got one")
