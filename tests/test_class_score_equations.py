"""Class scores against their definition: every token's part of every vector, sent through the layers one by one."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model, token_batch
from torch import Tensor

import globenc
from globenc import class_score_equations as equations
from globenc.contributions.reference_backend import equation_layer
from globenc.forward_pass import ForwardPass, LayerValues

LENGTHS = (9, 1, 6)
MASK_TOKEN = 4


def attentions(model, inputs) -> list[Tensor]:
    """alpha of every layer, [B, H, n, n]; models' own eager attention would round it to float32."""
    forward_pass = ForwardPass(model, inputs)
    layers = LayerValues(forward_pass, lambda trace: equation_layer(trace).alpha)
    forward_pass.run(layers)
    return layers.values


def layer_inputs(model, inputs) -> list[Tensor]:
    """The embeddings, and every layer's output, [B, n, d]; before a last norm of pre-LN models."""
    states: list[Tensor] = []
    layers = model.base_model.encoder.layer if hasattr(model.base_model, "encoder") else model.base_model.layers
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: states.append((*args, *kwargs.values())[0]), with_kwargs=True
        ),
        *(
            layer.register_forward_hook(
                lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
            )
            for layer in layers
        ),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return states


class Reference:
    """Hands out what an activation's chord starts from, in the order of activations."""

    def __init__(self, name: str, constants: list[Tensor]):
        self.name, self.constants = name, list(constants)

    def next(self) -> str | Tensor:
        return self.constants.pop(0) if self.name == "model" else self.name


def bert_layer(layer, parts: Tensor, alpha: Tensor, reference: Reference) -> Tensor:
    attention, output = layer.attention, layer.output
    values = equations.linear(parts, attention.self.value.weight, attention.self.value.bias)
    context = equations.attention(values, alpha)
    norm = attention.output.LayerNorm
    y1 = parts + equations.linear(context, attention.output.dense.weight, attention.output.dense.bias)
    u = equations.layer_norm(y1, norm.weight, norm.bias, norm.eps)
    h = equations.linear(u, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
    a = equations.activation(h, torch.nn.functional.gelu, reference.next())
    y2 = u + equations.linear(a, output.dense.weight, output.dense.bias)
    return equations.layer_norm(y2, output.LayerNorm.weight, output.LayerNorm.bias, output.LayerNorm.eps)


def bert_scores(model, layers, parts: Tensor, alphas: list[Tensor], reference: Reference) -> tuple[Tensor, Tensor]:
    """Scores [labels, n] and remainders [labels] of one text."""
    for layer, alpha in zip(layers, alphas, strict=True):
        parts = bert_layer(layer, parts, alpha, reference)
    pooler = model.bert.pooler.dense
    pooled = equations.activation(equations.linear(parts[:1], pooler.weight, pooler.bias), torch.tanh, reference.next())
    logits = equations.linear(pooled, model.classifier.weight, model.classifier.bias)
    shares = [
        equations.scores(logits, one, logits.new_ones(1)) for one in torch.eye(logits.shape[-1], dtype=logits.dtype)
    ]
    return torch.stack([score for score, _ in shares]), torch.stack([rest for _, rest in shares])


def modernbert_layer(layer, parts: Tensor, alpha: Tensor, reference: Reference) -> Tensor:
    def norm(module, parts: Tensor) -> Tensor:
        if isinstance(module, torch.nn.Identity):
            return parts
        return equations.layer_norm(parts, module.weight, module.bias, module.eps)

    d = layer.attn.Wo.weight.shape[0]
    bias = layer.attn.Wqkv.bias
    values = equations.linear(norm(layer.attn_norm, parts), layer.attn.Wqkv.weight[2 * d :], bias[2 * d :])
    context = equations.attention(values, alpha)
    parts = parts + equations.linear(context, layer.attn.Wo.weight, layer.attn.Wo.bias)
    both = equations.linear(norm(layer.mlp_norm, parts), layer.mlp.Wi.weight, layer.mlp.Wi.bias)
    activated, passed = both.chunk(2, -1)
    held = torch.nn.functional.gelu(activated.sum(1))
    return parts + equations.linear(equations.gate(passed, held), layer.mlp.Wo.weight, layer.mlp.Wo.bias)


def modernbert_scores(
    model, layers, parts: Tensor, alphas: list[Tensor], reference: Reference
) -> tuple[Tensor, Tensor]:
    for layer, alpha in zip(layers, alphas, strict=True):
        parts = modernbert_layer(layer, parts, alpha, reference)
    last = model.model.final_norm
    parts = equations.layer_norm(parts, last.weight, last.bias, last.eps)
    pooled = parts.mean(0, keepdim=True) if model.config.classifier_pooling == "mean" else parts[:1]
    head = model.head
    h = equations.linear(pooled, head.dense.weight, head.dense.bias)
    a = equations.activation(h, torch.nn.functional.gelu, reference.next())
    pooled = equations.layer_norm(a, head.norm.weight, head.norm.bias, head.norm.eps)
    logits = equations.linear(pooled, model.classifier.weight, model.classifier.bias)
    shares = [
        equations.scores(logits, one, logits.new_ones(1)) for one in torch.eye(logits.shape[-1], dtype=logits.dtype)
    ]
    return torch.stack([score for score, _ in shares]), torch.stack([rest for _, rest in shares])


MODELS = {
    "bert": ({}, bert_scores, bert_layer, lambda model: model.bert.encoder.layer),
    "modernbert": ({}, modernbert_scores, modernbert_layer, lambda model: model.model.layers),
    "modernbert-mean": (
        {"classifier_pooling": "mean"}, modernbert_scores, modernbert_layer, lambda model: model.model.layers,
    ),
}  # fmt: skip


def made(name: str):
    options, scores, layer, layers = MODELS[name]
    model = tiny_model(name.split("-")[0], head="SequenceClassification", num_labels=3, attention="sdpa", **options)
    return model, scores, layer, layers(model)


def constants(model) -> list[Tensor]:
    """What every chord of reference "model" starts from: the mean over a text of 22 mask tokens."""
    seen: list[Tensor] = []
    activations = [m for m in model.modules() if "GELU" in type(m).__name__ or isinstance(m, torch.nn.Tanh)]
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).mean(0)))
        for m in activations
    ]
    with torch.no_grad():
        model(torch.full((1, 22), MASK_TOKEN))
    for hook in hooks:
        hook.remove()
    layers = seen[:-1] if model.config.model_type == "bert" else []  # a gate's activation has no chord
    return [*layers, torch.zeros_like(seen[-1])]


@pytest.mark.parametrize("reference", ["zero", "origin", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_direct_propagation(name, reference):
    model, direct, _, layers = made(name)
    inputs = token_batch(LENGTHS)
    out = globenc.class_scores(model, label="all", reference=reference, mask_token_id=MASK_TOKEN, **inputs)
    alphas, embeddings = attentions(model, inputs), layer_inputs(model, inputs)[0]
    for text, n in enumerate(LENGTHS):
        parts = equations.embedding_parts(embeddings[text, :n])
        scores, rest = direct(
            model, layers, parts, [alpha[text, :, :n, :n] for alpha in alphas], Reference(reference, constants(model))
        )
        assert (out.scores[text, :, :n] - scores).abs().max() < 1e-10
        assert (out.remainder[text] - rest).abs().max() < 1e-10
        assert (out.scores[text, :, n:] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_a_layers_own_propagation(name):
    model, direct, layer_of, layers = made(name)
    inputs = token_batch(LENGTHS)
    out = globenc.class_scores(model, label="all", reference="origin", maps=True, per_layer=True, **inputs)
    alphas, states = attentions(model, inputs), layer_inputs(model, inputs)
    for text, n in enumerate(LENGTHS):
        weights = [alpha[text, :, :n, :n] for alpha in alphas]
        for index, layer in enumerate(layers):
            parts = equations.embedding_parts(states[index][text, :n])
            within = layer_of(layer, parts, weights[index], Reference("origin", []))
            # the gradient at the layer's output: scores of unit vectors put there
            gradient = _gradients(direct, model, layers[index + 1 :], weights[index + 1 :], states[index + 1][text, :n])
            expected = torch.einsum("lid,ijd->lij", gradient, within[:, :-1])
            assert (out.maps[index, text, :, :n, :n] - expected).abs().max() < 1e-10
        assert (out.maps[:, text].sum(-2)[..., :n] - out.layer_scores[:-1, text, :, :n]).abs().max() < 1e-10
        assert (out.maps[:, text, :, n:] == 0).all()


def _gradients(direct, model, layers, alphas, states) -> Tensor:
    """d logit / d x of the frozen network by what `layers` read, [labels, n, d], from the parts of changes of one unit
    each."""
    n, d = states.shape
    rows = []
    for k in range(d):
        unit = torch.zeros_like(states)
        unit[:, k] = states[:, k]
        split = torch.cat([equations.embedding_parts(unit)[:, :-1], equations.embedding_parts(states - unit)], 1)
        scores, _ = direct(model, layers, split, alphas, Reference("origin", []))
        rows.append(scores[:, :n] / states[:, k])
    return torch.stack(rows, -1)
