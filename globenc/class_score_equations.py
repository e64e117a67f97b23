"""Class scores as they are defined: every token's part of every vector, n x n x d, sent through the frozen network.

The decomposition is that of DecompX (Modarressi et al., ACL 2023) without its redistribution of biases: attention
weights and the denominators of norms are held (the AH and LN rules of Ali et al., ICML 2022), an activation is a
straight line through two points (the Rescale rule of DeepLIFT, Shrikumar et al., ICML 2017; from the origin, DecompX's
linear activation and the identity rule of AttnLRP, Achtibat et al., ICML 2024), and constants have a part of their own.

Written for one text, in letters of docs/class_scores.md, for any dtype. Everything else is tested against it.

Parts are [n, n + 1, d]: parts[i, k] is what token k has put into the vector at position i, parts[i, n] the
constants' part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def embedding_parts(embeddings: Tensor) -> Tensor:
    """x^0_(i<-k) = [i=k] e_k of the embeddings e, [n, d]."""
    n, d = embeddings.shape
    parts = embeddings.new_zeros(n, n + 1, d)
    parts[torch.arange(n), torch.arange(n)] = embeddings
    return parts


def with_constant(parts: Tensor, constant: Tensor | None) -> Tensor:
    """Parts of x + b."""
    if constant is None:
        return parts
    parts = parts.clone()
    parts[:, -1] += constant
    return parts


def linear(parts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Parts of W x + b."""
    return with_constant(parts @ weight.T, bias)


def attention(parts: Tensor, alpha: Tensor) -> Tensor:
    """Parts of sum_j alpha^h_ij v^h_j from those of the values, heads side by side, with alpha [H, n, n] held."""
    values = parts.unflatten(-1, (len(alpha), -1))  # [n, n + 1, H, d_h]
    return torch.einsum("hij,jkhd->ikhd", alpha, values).flatten(-2)


def layer_norm(parts: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centred: bool = True) -> Tensor:
    """Parts of (x - mean(x)) / s * gamma + beta with s held; without the mean for RMSNorm."""
    x = parts.sum(1)
    if centred:
        x = x - x.mean(-1, keepdim=True)
        parts = parts - parts.mean(-1, keepdim=True)
    s = (x.square().mean(-1) + eps).sqrt()
    return with_constant(parts / s[:, None, None] * gamma, beta)


def activation(parts: Tensor, phi: Callable[[Tensor], Tensor], reference: str | Tensor = "zero") -> Tensor:
    """Parts of phi(h) on the line through (h_ref, phi(h_ref)) and (h, phi(h)), unit by unit.

    h_ref: "zero", what the unit reads of no token, which is the frozen network's value where all embeddings are zero;
    "origin", 0; or constants [units].
    """
    h = parts.sum(1)
    if isinstance(reference, Tensor):
        h_ref = reference.expand_as(h)
    else:
        h_ref = parts[:, -1] if reference == "zero" else torch.zeros_like(h)
    theta = (phi(h) - phi(h_ref)) / (h - h_ref)
    return with_constant(parts * theta[:, None], phi(h) - theta * h)


def gate(parts: Tensor, held: Tensor) -> Tensor:
    """Parts of a * b with the activation a, [n, units], held."""
    return parts * held[:, None]


def scores(parts: Tensor, direction: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(S1): each token's part of sum_i weights_i <direction, x_i>, [n], and what no token has, a number."""
    shares = torch.einsum("i,ikd,d->k", weights, parts, direction)
    return shares[:-1], shares[-1]
