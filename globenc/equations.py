"""The paper's equations, written as the paper writes them.

Modarressi, Fayyaz, Yaghoobzadeh, Pilehvar: "GlobEnc: Quantifying Global Token Attribution by
Incorporating the Whole Encoder Layer in Transformers", NAACL 2022. Numbers in parentheses are the
paper's. This file is the definition: slow, memory O(n^2 d), any floating dtype, any device. Every
faster path of the package is tested against it.

Letters: B batch, n tokens, H heads, d_h head size, d hidden size; i is the query, j the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STAGES = ("N", "N-Res", "N-ResLN", "N-Enc")


@dataclass(frozen=True)
class EncoderLayer:
    """What equations (4)-(11) need of one encoder layer on one batch.

    A pre-LN layer has no norm behind its residual sum: gamma and s are None, and N-Enc is z+_ij (5) as N-Res is.

    Attributes:
        alpha: attention weights alpha^h_ij, [B, H, n, n]; zero in padded columns.
        value: value vectors v^h(x_j), value bias included, [B, H, n, d_h].
        output_weight: W_O, [d, H * d_h].
        hidden_states: the layer's input x, [B, n, d].
        gamma1, gamma2: weights of the two LayerNorms, [d].
        s1, s2: sqrt(var + eps) of what really entered each LayerNorm, [B, n].
        mask: True at real tokens, [B, n]; padded rows and columns of every result are zero.
    """

    alpha: Tensor
    value: Tensor
    output_weight: Tensor
    hidden_states: Tensor
    gamma1: Tensor | None
    s1: Tensor | None
    gamma2: Tensor | None
    s2: Tensor | None
    mask: Tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor,
    window: int | None = None,
    bias: Tensor | None = None,
    global_keys: Tensor | None = None,
) -> Tensor:
    """alpha^h_ij = softmax_j(q_i k_j * scaling + bias_ij) over real keys with |i - j| <= window or in `global_keys`.

    Returns:
        [B, H, n, n]; zero in the rows of padded queries that see no real key.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if bias is not None:
        scores = scores + bias
    seen = mask[:, None, None, :]
    if window is not None:
        place = torch.arange(query.shape[2], device=query.device)
        near = (place[:, None] - place).abs() <= window
        seen = seen & (near if global_keys is None else near | global_keys[:, None, None, :])
    alpha = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return alpha.masked_fill(~seen.any(-1, keepdim=True), 0)


def transformed_values(value: Tensor, output_weight: Tensor) -> Tensor:
    """f^h(x_j) = W_O^h v^h(x_j), [B, H, n, d]."""
    _, heads, _, head_dim = value.shape
    w = output_weight.view(-1, heads, head_dim)  # [d, H, d_h]
    return torch.einsum("bhja,dha->bhjd", value, w)


def layer_norm_part(z: Tensor, gamma: Tensor, s: Tensor) -> Tensor:
    """(6), (7): g(z_ij) = (z_ij - mean(z_ij)) / s_i * gamma, [B, n, n, d]."""
    return (z - z.mean(-1, keepdim=True)) / s[:, :, None, None] * gamma


def contribution_vectors(layer: EncoderLayer, stage: str = "N-Enc") -> Tensor:
    """The vectors whose norms are the stage's map, [B, n, n, d].

    N: z_ij (4). N-Res: z+_ij (5). N-ResLN: g1(z+_ij) (6). N-Enc: g2(g1(z+_ij)) (11).
    """
    f = transformed_values(layer.value, layer.output_weight)
    c = torch.einsum("bhij,bhjd->bijd", layer.alpha, f)  # (4)
    if stage != "N":
        c = c + torch.diag_embed(layer.hidden_states.transpose(1, 2)).permute(0, 2, 3, 1)  # (5): x_i where i = j
    if stage in ("N-ResLN", "N-Enc") and layer.gamma1 is not None and layer.s1 is not None:
        c = layer_norm_part(c, layer.gamma1, layer.s1)
    if stage == "N-Enc" and layer.gamma2 is not None and layer.s2 is not None:
        c = layer_norm_part(c, layer.gamma2, layer.s2)
    return c * (layer.mask[:, :, None] & layer.mask[:, None, :])[..., None]


def contribution_norms(layer: EncoderLayer, stage: str = "N-Enc") -> Tensor:
    """N, N-Res, N-ResLN or N-Enc: ||c_ij||, [B, n, n]."""
    return contribution_vectors(layer, stage).norm(dim=-1)


def mixing_ratio(layer: EncoderLayer, stage: str = "N-Enc") -> Tensor:
    """(8), (14): r_i = ||sum_{j!=i} c_ij|| / (||sum_{j!=i} c_ij|| + ||c_ii||), [B, n].

    Zero where token i has neither (a padded row).
    """
    c = contribution_vectors(layer, stage)
    diagonal = torch.diagonal(c, dim1=1, dim2=2).transpose(1, 2)  # c_ii, [B, n, d]
    others = (c.sum(2) - diagonal).norm(dim=-1)
    # one token has no others: the subtraction above is then exactly zero
    total = others + diagonal.norm(dim=-1)
    return torch.where(total > 0, others / total.where(total > 0, torch.ones_like(total)), torch.zeros_like(total))


def _identity(layer: EncoderLayer) -> Tensor:
    return torch.diag_embed(layer.mask.to(layer.alpha.dtype))


def local_map(layer: EncoderLayer, method: str = "N-Enc") -> Tensor:
    """A layer's token-to-token map under one of the eight methods, [B, n, n], rows are queries."""
    if method in STAGES:
        return contribution_norms(layer, method)
    if method == "N-FixedRes":  # (16)
        norms = contribution_norms(layer, "N")
        total = norms.sum(-1, keepdim=True)
        return 0.5 * norms / total.where(total > 0, torch.ones_like(total)) + 0.5 * _identity(layer)
    w = layer.alpha.mean(1) * layer.mask[:, :, None]
    if method == "W":
        return w
    if method == "W-FixedRes":  # (13)
        return 0.5 * w + 0.5 * _identity(layer)
    if method == "W-Res":  # (15)
        r = mixing_ratio(layer, "N-Enc")[:, :, None]
        off_diagonal = w * (1 - _identity(layer))
        total = off_diagonal.sum(-1, keepdim=True)
        # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
        alone = (total == 0).to(w.dtype)
        mixed = r * off_diagonal / (total + alone) + (1 - r) * _identity(layer)
        return mixed + alone * r * _identity(layer)
    raise ValueError(f"method must be one of the eight of the paper, got {method!r}")


def rollout(maps: Tensor) -> Tensor:
    """(12): R_1 = A_1, R_l = A_l R_{l-1}; [L, ..., n, n] in and out, no scaling of any kind."""
    products = [maps[0]]
    for local in maps[1:]:
        products.append(local @ products[-1])
    return torch.stack(products)
