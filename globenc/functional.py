"""Attribution of tensors: a transformers model and its own inputs in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .answers import by_name, returning_tuples
from .capture import Begin, Finish, LayerTrace, capture
from .contributions import completeness
from .contributions.backend import Backend, choose_backend
from .contributions.layer_map import LayerMap, by_rows, normalize_rows
from .contributions.layer_norms import late_scale
from .contributions.weight_cache import forget
from .encoders import Encoder
from .errors import refuses_target
from .inputs import check_inputs
from .methods import Method, Stage, get_method, get_stage
from .model_state import Loan, precise
from .rollouts import Position, RequestedRows, full_map, multiply, requested_rows, top_down


@dataclass(frozen=True, eq=False)
class AttributionOutput:
    """Scores of every token for the positions asked for.

    Attributes:
        scores: [batch, n] for one position, [batch, positions, n] for several; they sum to 1 over the real tokens and
            are zero at padding. float64 for float64 models, else float32.
        log2_scale: [batch] or [batch, positions], float64: the rollout's own value is scores * 2**log2_scale.
        layer_scores: the same up to every layer, [layers, ...], or None.
        layer_log2_scale: [layers, ...], or None.
        model_output: what the model returned in the same forward pass.
    """

    scores: Tensor
    log2_scale: Tensor
    layer_scores: Tensor | None
    layer_log2_scale: Tensor | None
    model_output: Any


@dataclass(frozen=True, eq=False)
class MethodsOutput:
    """One row of the rollout under several methods, layer by layer.

    Attributes:
        rollouts: by method, the row of the rollout up to every layer (12), [layers, batch, n].
        layers: by method, the row of every layer's own map, [layers, batch, n]. Both sum to 1 over the real tokens and
            are zero at padding; float64 for float64 models, else float32.
        model_output: what the model returned in the same forward pass.
    """

    rollouts: dict[str, Tensor]
    layers: dict[str, Tensor]
    model_output: Any


T = TypeVar("T")


class _Run:
    """A model and its inputs, checked and ready for one forward pass."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], backend: str = "torch"):
        encoder = Encoder.of(model)
        self.model, self.family, self.layers = encoder.model, encoder.family, encoder.layers
        self.methods = encoder.methods
        self.inputs = by_name(self.model, inputs)
        self.mask = check_inputs(encoder, inputs)
        self.backend: Backend = choose_backend(backend, self.mask, self.layers)
        self.gaps: list[Tensor] = []
        self.doubts: list[Tensor] = []

    def method(self, name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: there is none, or it has no meaning for the model's family.
        """
        method = get_method(name)
        self._check_stage(method.stage)
        return method

    def stage(self, name: str) -> Stage:
        """The stage of that name; raises as `method`."""
        stage = get_stage(name)
        self._check_stage(stage)
        return stage

    def _check_stage(self, stage: Stage | None) -> None:
        if self.family.pre_norm and stage is not None and stage.norms == 1:
            raise ValueError(
                f"method {stage.name!r} has no meaning for {self.family.model_type!r}: no LayerNorm follows its "
                "residual sums (pre-LN); N-Enc and N-Res are what a token adds to the residual stream"
            )

    def check_position(self, position: Position) -> None:
        """Raises ValueError where a named position does not exist in the family."""
        if isinstance(position, str) and position == "cls" and not self.family.has_cls:
            raise ValueError(
                f"position 'cls' has no meaning for {self.family.model_type!r}: no token of it stands for the whole; "
                "use position='mean', or a number"
            )

    def forward(self, consume: Callable[[int, LayerTrace], None], begin: Begin | None = None) -> Any:
        """Show every layer to `consume`, or to `begin` (see `capture`), whose numbers keep their own precision."""

        def check(trace: LayerTrace) -> None:
            self.gaps.append(self.backend.residual_mismatch(trace).to(self.mask.device))
            self.doubts.extend(doubt.to(self.mask.device) for doubt in trace.doubts)

        def observe(index: int, trace: LayerTrace) -> None:
            with precise(self.mask.device):
                consume(index, trace)
                check(trace)

        def observe_begin(index: int, trace: LayerTrace) -> Finish | None:
            assert begin is not None
            with precise(self.mask.device):
                finish = begin(index, trace)
                if finish is None:
                    return None
                check(trace)

            def observe_end(output_norm_input: Tensor | None, output: Tensor) -> None:
                with precise(self.mask.device):
                    finish(output_norm_input, output)

            return observe_end

        self.gaps, self.doubts = [], []
        begun = None if begin is None else observe_begin

        def captured() -> Any:
            with returning_tuples(self.model):
                return capture(self.model, self.layers, self.inputs, self.mask, observe, self.backend.attention, begun)

        if self.family.prepare is None:
            return captured()
        loan, base_model = Loan(), self.model.base_model

        def prepared() -> Any:
            loan.one_at_a_time(base_model)
            change = self.family.prepare(base_model, self.mask.shape[1])  # type: ignore[misc]
            if change is not None:
                loan.change(*change)
            self.layers = Encoder.of(self.model).layers
            return captured()

        return loan.run(prepared)

    def checked(self, compute: Callable[[], T], check: bool = True) -> T:
        """compute(), which calls `forward`; its answers are looked at when all the work is on its way.

        Raises:
            ValueError: something of the caller's changes what flows from the attention to the first LayerNorm (unless
                `check` is off), so that the parts would not be the output's.
            torch.OutOfMemoryError: the device's memory is too small; the message says what to lower.
        """
        try:
            for _ in range(3):
                result = Loan().run(compute)
                if not self.doubts or not bool(torch.stack(self.doubts).any()):
                    break
                for layer in self.layers:  # the weights have changed since the last call
                    forget(layer)
            else:
                raise RuntimeError("the model's weights change during the call: attribute when they stand still")
        except torch.OutOfMemoryError as error:
            batch, n = self.mask.shape
            raise torch.OutOfMemoryError(
                f"out of memory on {self.mask.device} with {batch} texts of {n} tokens: take fewer texts at once, cut "
                "them shorter, load the model in half precision (dtype=torch.bfloat16), and ask for position='all', "
                f"maps and backend='reference' only where n x n numbers fit; {str(error).splitlines()[0]}"
            ) from error
        worst = torch.stack(self.gaps)
        if check and bool((worst > 1).any()):
            raise ValueError(
                f"layer {int((worst > 1).nonzero()[0])}: what enters the first LayerNorm is not the residual plus the "
                "output projection of the attention; a hook or a replaced forward changes it in between (remove it, or "
                "patch the value vectors or the layer's input instead), or the encoder family's names are wrong; "
                "completeness_gap shows by how much"
            )
        return result


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(
            "the attribution is not finite: the model's activations or weights hold NaN or infinity "
            "(a float16 model overflows easily: load it with dtype=torch.float32 or torch.bfloat16)"
        )
    return values


@refuses_target
def attribute(
    model: nn.Module,
    *,
    method: str = "N-Enc",
    position: Position = "cls",
    per_layer: bool = False,
    row_normalize: bool = False,
    backend: str = "auto",
    **model_inputs: Any,
) -> AttributionOutput:
    """Token attribution by rollout of a model's local maps, in one forward pass.

    GlobEnc (Modarressi et al., NAACL 2022) is method "N-Enc", equations (4)-(12). Memory is linear in n except for
    position "all".

    Args:
        model: a transformers encoder of a known family with any head (`globenc.supported_encoders()`); it is run in
            evaluation mode without gradients and left as it was.
        method: W, W-FixedRes, W-Res, N, N-FixedRes, N-Res, N-ResLN or N-Enc.
        position: whose output vector is attributed. "cls": each text's first token; "mean": the mean over real tokens;
            an int: a place among a text's real tokens, negative from the end; a list of them: several rows of scores;
            "all": every token, the full matrix; a tensor [n], [batch, n] or [batch, positions, n]: a weighted sum of
            tokens.
        per_layer: also the rollout up to every layer.
        row_normalize: divide the rows of every local map by their sums before rollout (the paper does not).
        backend: "auto" (Triton kernels on an NVIDIA GPU from compute capability 8.0 on, for float32, float16 and
            bfloat16 layers of up to 32 heads of size 16 to 128; PyTorch elsewhere), "torch", "triton" or "reference"
            (the equations as written, O(n^2 d) memory). An explicit choice never falls back.
        **model_inputs: what the model's forward takes: input_ids [batch, n] or inputs_embeds, attention_mask
            [batch, n] with padding on either side, token_type_ids, position_ids, ...

    Returns:
        AttributionOutput with scores [batch, n] or [batch, positions, n].

    Raises:
        TypeError, ValueError: a model, input, method, position or backend that cannot be used; the message says why.
        RuntimeError: backend "triton" cannot run here, or cannot take this model.
        FloatingPointError: the model's activations are not finite.
        torch.OutOfMemoryError: with what to lower.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.attribute(explainer.model, **inputs).scores.shape
        torch.Size([1, 5])
    """
    run = _Run(model, model_inputs, backend)
    chosen = run.method(method)
    run.check_position(position)
    if isinstance(position, str) and position == "all":
        output, mantissa, scale = run.checked(lambda: _all_rows(run, chosen, per_layer, row_normalize))
    else:
        rows = requested_rows(position, run.mask, torch.float64 if run.model.dtype == torch.float64 else torch.float32)
        output, mantissa, scale = run.checked(lambda: _rows_of_rollout(run, chosen, rows, per_layer, row_normalize))
        if rows.single:
            mantissa, scale = mantissa[:, :, 0], scale[:, :, 0]
    total = _finite(mantissa.sum(-1))
    scores = normalize_rows(mantissa)
    scale = torch.where(total > 0, scale + torch.log2(total.where(total > 0, torch.ones_like(total)).double()), 0)
    return AttributionOutput(
        scores=scores[-1],
        log2_scale=scale[-1],
        layer_scores=scores if per_layer else None,
        layer_log2_scale=scale if per_layer else None,
        model_output=output,
    )


@refuses_target
def compare_methods(
    model: nn.Module,
    *,
    methods: Sequence[str] | None = None,
    position: Position = "cls",
    backend: str = "auto",
    **model_inputs: Any,
) -> MethodsOutput:
    """One row of the rollout under several methods, up to every layer, and of each layer alone, in one forward pass.

    Args:
        model, backend, **model_inputs: as in `globenc.attribute`.
        methods: names; None is all that have a meaning for the model.
        position: "cls", "mean", one position as an int, or a weight tensor [n] or [batch, n].

    Returns:
        MethodsOutput.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> out = globenc.compare_methods(explainer.model, **inputs)
        >>> len(out.rollouts), out.rollouts["N-Enc"].shape[1:]
        (8, torch.Size([1, 5]))
    """
    run = _Run(model, model_inputs, backend)
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got the string {methods!r}")
    names = run.methods if methods is None else list(methods)
    if not names:
        raise ValueError("methods is an empty list: give at least one name")
    chosen = [run.method(name) for name in names]
    run.check_position(position)
    if isinstance(position, str) and position == "all":
        raise ValueError("position must be a single one here, got 'all'")
    rows = requested_rows(position, run.mask, torch.float64 if run.model.dtype == torch.float64 else torch.float32)
    if not rows.single:
        raise ValueError("position must be a single one here, got several")

    def compute() -> MethodsOutput:
        made: dict[str, list[LayerMap]] = {method.name: [] for method in chosen}

        def consume(index: int, trace: LayerTrace) -> None:
            for method in chosen:
                made[method.name].append(run.backend.layer_map(trace, method))

        output = run.forward(consume)
        rollouts, alone = {}, {}
        with torch.no_grad(), precise(run.mask.device):
            for name, maps in made.items():
                own = [layer.through(rows.weights, False) for layer in maps]
                mantissa, _ = top_down(own[-1], rows, reversed(maps[:-1]), False, per_layer=True)
                rollouts[name] = normalize_rows(_finite(mantissa[:, :, 0]))
                alone[name] = normalize_rows(_finite(torch.stack([row.to(mantissa.device)[:, 0] for row in own])))
        return MethodsOutput(rollouts, alone, output)

    return run.checked(compute)


def _rows_of_rollout(
    run: _Run, method: Method, wanted: RequestedRows, per_layer: bool, row_normalize: bool
) -> tuple[Any, Tensor, Tensor]:
    """Model output, and mantissa [G, B, m, n] and scale [G, B, m] of the requested rows of the rollout."""
    below: list[LayerMap] = []
    top: list[Tensor] = []

    def through_top(layer: LayerMap) -> None:
        top.append(layer.through(wanted.weights, row_normalize))

    def take_top(rows: Tensor) -> None:
        top.append(normalize_rows(rows) if row_normalize else rows)

    def begin(index: int, trace: LayerTrace) -> Finish:
        """Make of a layer what its attention says, so that no more than this is held while the rest of it runs."""
        modules, is_top = trace.modules, index == len(run.layers) - 1
        layer = rows = None
        if is_top and wanted.positions is not None:
            rows = run.backend.top_rows(trace, method, wanted.positions)
        else:
            layer = run.backend.layer_map(trace, method)
            if not is_top:
                below.append(layer)

        def finish(output_norm_input: Tensor | None, output: Tensor) -> None:
            scale = late_scale(modules, method, output_norm_input)
            if layer is not None:
                if scale is not None:
                    layer.scale_rows(scale)
                if is_top:
                    through_top(layer)
            elif rows is not None and wanted.positions is not None:
                take_top(rows if scale is None else rows * scale.gather(1, wanted.positions)[:, :, None])

        return finish

    def consume(index: int, trace: LayerTrace) -> None:
        if index < len(run.layers) - 1:
            below.append(run.backend.layer_map(trace, method))
        elif wanted.positions is None:
            through_top(run.backend.layer_map(trace, method))
        else:
            take_top(run.backend.top_rows(trace, method, wanted.positions))

    output = run.forward(consume, begin if run.backend.maps_before_feed_forward else None)
    with torch.no_grad(), precise(run.mask.device):
        return output, *top_down(top[0], wanted, reversed(below), row_normalize, per_layer)


def _all_rows(run: _Run, method: Method, per_layer: bool, row_normalize: bool) -> tuple[Any, Tensor, Tensor]:
    """Model output, and mantissa [G, B, n, n] and scale [G, B, n] of the whole rollout, layer after layer."""
    products: list[tuple[Tensor, Tensor]] = []
    nothing = (None, torch.zeros(run.mask.shape, dtype=torch.float64, device=run.mask.device))

    def consume(index: int, trace: LayerTrace) -> None:
        local = full_map(run.backend.layer_map(trace, method), row_normalize)
        before = products[-1] if products else nothing
        if not per_layer:
            products.clear()
        products.append(multiply(local, *before))

    output = run.forward(consume)
    mantissas, scales = zip(*products, strict=True)
    return output, torch.stack(mantissas), torch.stack(scales)


@refuses_target
def contribution_maps(model: nn.Module, *, method: str = "N-Enc", backend: str = "auto", **model_inputs: Any) -> Tensor:
    """Every layer's token-to-token map under one method: how much of token j is in token i's output, unnormalised.

    Args:
        model, method, backend, **model_inputs: as in `globenc.attribute`.

    Returns:
        [layers, batch, n, n], rows are the receiving tokens (queries); padded rows and columns are zero. float64 for
        float64 models, else float32.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.contribution_maps(explainer.model, **inputs).shape[1:]
        torch.Size([1, 5, 5])
    """
    run = _Run(model, model_inputs, backend)
    chosen = run.method(method)

    def compute() -> Tensor:
        maps: list[Tensor] = []
        run.forward(lambda index, trace: maps.append(full_map(run.backend.layer_map(trace, chosen))))
        return torch.stack(maps)

    return _finite(run.checked(compute))


@refuses_target
def mixing_ratios(model: nn.Module, *, method: str = "N-Enc", backend: str = "auto", **model_inputs: Any) -> Tensor:
    """How much of a token's output comes from other tokens, (8) and (14), layer by layer.

    r_i = ||sum_{j!=i} c_ij|| / (||sum_{j!=i} c_ij|| + ||c_ii||): 0 keeps to itself, 1 is made of its context.

    Args:
        model, backend, **model_inputs: as in `globenc.attribute`.
        method: the stage whose vectors are mixed: N, N-Res, N-ResLN or N-Enc.

    Returns:
        [layers, batch, n] in 0..1, zero at padding.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.mixing_ratios(explainer.model, **inputs).shape[1:]
        torch.Size([1, 5])
    """
    run = _Run(model, model_inputs, backend)
    stage = run.stage(method)

    def compute() -> Tensor:
        ratios: list[Tensor] = []
        run.forward(lambda index, trace: ratios.append(run.backend.mixing_ratios(trace, stage)))
        return torch.stack(ratios)

    return _finite(run.checked(compute))


@refuses_target
def completeness_gap(model: nn.Module, **model_inputs: Any) -> Tensor:
    """How far the contributions are from adding up to what each layer really put out: the method's own proof.

    In every layer sum_j c_ij, recomputed from the captured queries, keys, values and residual, plus what belongs to no
    token (the biases b_O, beta1, beta2 and the feed-forward block's vector) is compared with the layer's output, and
    the output with what the next layer reads. The gap is rounding: below 1e-12 for float64 models, about 1e-6 for
    float32, 1e-2 for bfloat16. More means that an encoder was registered with wrong names, or that a hook changes what
    flows between the parts.

    Args:
        model, **model_inputs: as in `globenc.attribute`.

    Returns:
        ||parts - output|| / ||output||, or ||next layer's input - output|| / ||output|| where that is more,
        [layers, batch, n]; zero at padding.

    Raises:
        TypeError, ValueError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> bool(globenc.completeness_gap(explainer.model, **inputs).max() < 1e-5)
        True
    """
    run = _Run(model, model_inputs)

    def compute() -> Tensor:
        gaps: list[Tensor] = []
        outputs: list[Tensor] = []  # of the layer before

        def consume(index: int, trace: LayerTrace) -> None:
            if outputs:
                before = outputs.pop()
                gaps[-1] = torch.maximum(gaps[-1], completeness.relative_gap(trace.hidden_states, before, trace.mask))
            gaps.append(by_rows(trace, completeness.completeness_gap))
            assert trace.output is not None
            outputs.append(trace.output)

        run.forward(consume)
        return torch.stack(gaps)

    return run.checked(compute, check=False)
