"""Class scores: how much each token speaks for a label or against it, in logits that sum to the model's own."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contributions.backend import choose_backend
from ..forward_pass import ForwardPass, require_finite
from ..predictions import by_name, returning_tuples
from ..rollouts import Position
from .explained import Answer, Explained, Label, explained
from .maps import score_maps
from .network import FrozenNetwork
from .references import (
    MASK_TOKENS,
    REFERENCES,
    cache_points,
    cached_points,
    set_constant_reference,
    set_origin_reference,
    set_zero_reference,
)

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far scores and remainder may be from the logit, as a share of what is summed."""


@dataclass(frozen=True, eq=False)
class ClassScores:
    """Signed scores of every token for what was explained, in its unit: logits.

    With label "all" each tensor has a dimension for labels behind the batch's.

    Attributes:
        scores: [batch, n]; zero at padding.
        remainder: what belongs to no token, [batch]: with reference "zero" the frozen network's answer to empty input,
            with "origin" and "model" the share of all constants (biases and what chords cut off).
        logits: what was explained, [batch], as the model computed it. scores.sum(-1) + remainder is that number.
        labels: numbers of the explained labels, [batch], or [labels] for "all"; None for `answer` and questions.
        label_names: their names, or None.
        maps: evidence that flows from token j to token i in a layer, [layers, batch, n, n], rows are receivers; or
            None.
        layer_scores: the scores of the hidden states between layers, [layers + 1, batch, n], the first are `scores`; or
            None.
        model_output: what the model returned in the same forward pass.
    """

    scores: Tensor
    remainder: Tensor
    logits: Tensor
    labels: Tensor | None
    label_names: list[str] | None
    maps: Tensor | None
    layer_scores: Tensor | None
    model_output: Any

    @property
    def completeness_gap(self) -> Tensor:
        """|scores.sum(-1) + remainder - logits|, [batch]: rounding, since the remainder is computed apart."""
        return (self.scores.double().sum(-1) + self.remainder.double() - self.logits.double()).abs()


def class_scores(
    model: nn.Module,
    *,
    label: Label = "predicted",
    position: Position | None = None,
    answer: Answer | None = None,
    reference: str = "zero",
    maps: bool = False,
    per_layer: bool = False,
    backend: str = "auto",
    mask_token_id: int | None = None,
    **model_inputs: Any,
) -> ClassScores:
    """Which tokens speak for a label and which against it: signed scores that sum to the label's logit.

    Attention weights, the denominators of norms and the slopes of activations are held as they are for this text. The
    network is then affine in the embeddings e, and one pull-back g = d logit / d e gives scores <g_i, e_i>: gradient x
    input of the frozen network (conservative propagation, Ali et al., ICML 2022), and the same numbers as DecompX
    (Modarressi et al., ACL 2023) without its redistribution of biases. docs/class_scores.md has the algebra.

    Args:
        model: a transformers encoder of a known family with a head: sequence, image or token classification, masked
            language model, questions; any other with `answer`. It is run in evaluation mode and left as it was.
        label: "predicted" (the highest logit), a label's number or name, one for each text, or "all".
            For questions "predicted" (start plus end logit of the best answer), "start" or "end".
        position: of heads that answer for tokens, which token: an int, or a list for the mean over a span; None is the
            mask token of a masked language model whose `mask_token_id` is known.
        answer: any number of the model's output instead of a label, for instance a margin or a similarity: a function
            from the output to a tensor [batch]. Lengths in cosines and normalisers of softmaxes are held as norms are.
        reference: from where the slope of an activation is taken, phi(h) being reached from phi(h_ref): "zero", h_ref
            of empty input through this text's attention and norms (a second pass without queries and keys); "model",
            of a text of mask tokens, read once for a model and kept, and 0 in the head; "origin", h_ref = 0.
        maps: also token-to-token evidence in every layer, n x n numbers a layer.
        per_layer: also the scores of the hidden states between layers.
        backend: as in `globenc.attribute`.
        mask_token_id: for reference "model", `tokenizer.mask_token_id`; None reads it from the configuration.
        **model_inputs: as in `globenc.attribute`.

    Returns:
        ClassScores; float64 for float64 models, else float32.

    Raises:
        TypeError, ValueError: a model, input or option that cannot be used; the message says why.
        FloatingPointError: the model's activations or logits are not finite.
        RuntimeError: the model computes something that is not held as stated, so that the scores do not sum.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> out = globenc.class_scores(explainer.model, **inputs)
        >>> out.scores.shape, out.label_names
        (torch.Size([1, 5]), ['positive'])
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {reference!r}")
    forward_pass = ForwardPass(model, model_inputs, backend)
    masked = _mask_tokens(forward_pass, mask_token_id)
    asked = explained(forward_pass.encoder.model, forward_pass.mask, label, position, answer, masked)

    def compute() -> ClassScores:
        starts = None
        if reference == "model":
            starts = _model_reference(forward_pass, mask_token_id, backend)
        network = FrozenNetwork(
            forward_pass.encoder, forward_pass.inputs, forward_pass.mask, reference != "zero", forward_pass.backend
        )
        output, value = network.record(asked)
        _check_value(value)
        if not (maps or per_layer):
            network.release_layers()
        remainder = None
        if reference == "zero":
            remainder = set_zero_reference(network, asked)
        elif starts is not None:
            set_constant_reference(network, starts)
        else:
            set_origin_reference(network)
        return _scores(forward_pass, network, output, asked, value, remainder, maps, per_layer)

    def prepared() -> ClassScores:
        with torch.inference_mode(False), returning_tuples(forward_pass.encoder.model):
            return forward_pass.prepared(compute)

    result = forward_pass.with_fresh_weights(prepared)
    _check_sum(result, forward_pass)
    return result


def _scores(
    forward_pass: ForwardPass,
    network: FrozenNetwork,
    output: Any,
    asked: Explained,
    value: Tensor,
    remainder: Tensor | None,
    maps: bool,
    per_layer: bool,
) -> ClassScores:
    """The pull-back of the explained numbers, and what is made of it."""
    mask, dtype = forward_pass.mask, forward_pass.dtype
    states = network.states if per_layer or maps else network.states[:1]
    gradients, constants = network.pull(value, [*states, *(network.contexts if maps else [])])

    def times(gradient: Tensor, state: Tensor) -> Tensor:
        # of several labels the gradient has one more dimension in front
        products = (gradient.to(dtype) * state.detach().to(dtype)).sum(-1)[..., : mask.shape[1]]
        return products if products.ndim == 2 else products.transpose(0, 1)

    by_layer = [times(gradient, state) for gradient, state in zip(gradients, states, strict=False)]
    padding = ~mask if value.ndim == 1 else ~mask[:, None]
    _check_padding(by_layer[0], padding)
    by_layer = [scores.masked_fill(padding, 0) for scores in by_layer]
    if constants is not None:
        remainder = constants if value.ndim == 1 else constants.transpose(0, 1)
    assert remainder is not None  # of the zero reference, where there are no constants
    return ClassScores(
        scores=require_finite(by_layer[0]),
        remainder=require_finite(remainder.to(dtype)),
        logits=value.detach().to(dtype),
        labels=asked.labels,
        label_names=asked.names,
        maps=score_maps(forward_pass, gradients[len(states) :], by_layer) if maps else None,
        layer_scores=torch.stack(by_layer) if per_layer else None,
        model_output=_detached(output),
    )


def _model_reference(forward_pass: ForwardPass, mask_token_id: int | None, backend: str) -> list[Tensor]:
    """What every activation of the layers reads in a text of mask tokens, once for a model and its weights."""
    model = forward_pass.encoder.model
    token = _mask_token(forward_pass, mask_token_id)
    starts = cached_points(model, token)
    if starts is None:
        ids = torch.full((1, MASK_TOKENS), token, device=forward_pass.mask.device)
        inputs = by_name(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        mask = torch.ones_like(ids, dtype=torch.bool)
        chosen = choose_backend(backend, mask, forward_pass.encoder.layers)
        network = FrozenNetwork(forward_pass.encoder, inputs, mask, False, chosen)
        starts = [line.h.reshape(-1, line.h.shape[-1]).mean(0) for line in network.record_layer_lines()]
        cache_points(model, token, starts)
    return starts


def _mask_token(forward_pass: ForwardPass, mask_token_id: int | None) -> int:
    if forward_pass.encoder.family.reads_images:
        raise ValueError("reference 'model' needs a mask token, which images have not: use 'zero' or 'origin'")
    model = forward_pass.encoder.model
    token = getattr(model.config, "mask_token_id", None) if mask_token_id is None else mask_token_id
    if token is None:
        raise ValueError(
            "reference 'model' needs a mask token: pass mask_token_id=tokenizer.mask_token_id, or use "
            "reference='zero', which needs none"
        )
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise ValueError(
            "reference 'model' needs whole layers, and config.chunk_size_feed_forward cuts them: set it to 0, or use "
            "reference='zero'"
        )
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
        raise ValueError(f"mask_token_id must be in 0..{vocabulary - 1}, got {token!r}")
    return token


def _mask_tokens(forward_pass: ForwardPass, mask_token_id: int | None) -> Tensor | None:
    """True at mask tokens, [B, n]; None where they are not known."""
    ids = forward_pass.inputs.get("input_ids")
    if mask_token_id is None:
        mask_token_id = getattr(forward_pass.encoder.model.config, "mask_token_id", None)
    return None if mask_token_id is None or ids is None else (ids == mask_token_id) & forward_pass.mask


def _check_value(value: Tensor) -> None:
    if value.grad_fn is None:
        raise ValueError(
            "what is explained does not depend on the text: answer must use the model's output, with its gradient, and "
            "other than by what is held: a softmax (give its logit) or a length; nor may the model, its head or a hook "
            "detach it"
        )
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            "what is explained is not finite: the model's activations or weights hold NaN or infinity (a float16 model "
            "overflows easily: load it with dtype=torch.float32 or torch.bfloat16)"
        )


def _check_padding(scores: Tensor, padding: Tensor) -> None:
    """Raises ValueError where what is explained was read from padding."""
    of_padding = (scores * padding).abs().amax(-1)
    texts = of_padding if of_padding.ndim == 1 else of_padding.amax(1)
    if bool((texts > 1e-3 * scores.flatten(1).abs().amax(1)).any()):
        raise ValueError(
            f"what is explained is read from padding (text {int(texts.argmax())} of the batch): the model's head reads "
            "the first column, so pad on the right"
        )


def _check_sum(result: ClassScores, forward_pass: ForwardPass) -> None:
    tolerance = TOLERANCE[forward_pass.encoder.model.dtype]
    size = result.scores.abs().sum(-1) + result.remainder.abs() + result.logits.abs()
    gap = result.completeness_gap / size.double().clamp_min(1e-30)
    if bool((gap > tolerance).any()):
        raise RuntimeError(
            f"the scores do not sum to what is explained (off by {float(gap.max()):.1e} of its size): the model, "
            "a hook in it or `answer` computes something that class scores cannot hold, such as a product of two parts "
            "that both depend on the text"
        )


def _detached(output: Any) -> Any:
    """A model's output without the graph of its pass."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, MutableMapping):
        for key in list(output):
            output[key] = _detached(output[key])
        return output
    return type(output)(map(_detached, output)) if type(output) in (tuple, list) else output
