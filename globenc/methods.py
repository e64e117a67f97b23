"""The eight methods of the paper as a table of small definitions.

A method is a source (attention weights, or the norms of one stage's contribution vectors) and what
is done to each row of it. Section and equation numbers: Modarressi et al., NAACL 2022.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Which parts of the layer a contribution vector has gone through."""

    name: str
    residual: bool
    norms: int  # how many of the two LayerNorms


STAGES: dict[str, Stage] = {
    "N": Stage("N", residual=False, norms=0),
    "N-Res": Stage("N-Res", residual=True, norms=0),
    "N-ResLN": Stage("N-ResLN", residual=True, norms=1),
    "N-Enc": Stage("N-Enc", residual=True, norms=2),
}


@dataclass(frozen=True)
class Method:
    """One local map.

    Attributes:
        name: the paper's name.
        summary: one line for help texts.
        equation: the paper's number of it; empty where it has none.
        stage: whose norms fill the map; None for the mean attention weights.
        mix: what is mixed with the identity: "" nothing, "half" 0.5 (13, 16), "ratio" the N-Enc mixing ratio (15).
        normalize: rows are divided by their sum before the mix.
    """

    name: str
    summary: str
    equation: str
    stage: Stage | None
    mix: str = ""
    normalize: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("N-Enc", "GlobEnc: norms through attention, residual and any norms behind it", "11", STAGES["N-Enc"]),
        Method("N-ResLN", "norms through attention, residual and the first LayerNorm", "6", STAGES["N-ResLN"]),
        Method("N-Res", "norms through attention and residual", "5", STAGES["N-Res"]),
        Method("N", "norms through attention alone", "4", STAGES["N"]),
        Method("N-FixedRes", "N, rows summing to 1, half identity", "16", STAGES["N"], mix="half", normalize=True),
        Method("W", "mean attention weights", "", None),
        Method("W-FixedRes", "attention rollout: W and half identity", "13", None, mix="half"),
        Method("W-Res", "W mixed with the identity by the N-Enc mixing ratio", "15", None, mix="ratio"),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no method has that name; the message lists the eight.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}{_hint(name)}")
    return METHODS[name]


def _hint(name: object) -> str:
    """What a near miss probably meant."""
    meant = {"globenc": "N-Enc", **{known.lower(): known for known in METHODS}}.get(str(name).lower())
    return f", did you mean {meant!r}?" if meant else ""


def get_stage(name: str) -> Stage:
    """The stage of that name: N, N-Res, N-ResLN or N-Enc.

    Raises:
        ValueError: no stage has that name; mixing ratios are defined for these four alone.
    """
    if name not in STAGES:
        raise ValueError(f"method must be one of {', '.join(STAGES)} here; got {name!r}")
    return STAGES[name]
