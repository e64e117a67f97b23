"""One checked forward pass, which shows a model's layers to a consumer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .capture import AttentionTrace, LayerConsumer, LayerEnd, LayerTrace, capture, wrong_norm
from .contributions.backend import choose_backend
from .contributions.weight_cache import invalidate
from .encoders import Encoder
from .inputs import check_inputs
from .methods import Method, Stage, get_method, get_stage
from .model_state import Loan, precise
from .predictions import by_name, returning_tuples
from .rollouts import Position

T = TypeVar("T")


class ForwardPass:
    """A model and its inputs, checked and ready for one forward pass.

    Attributes:
        encoder: the model.
        mask: the real tokens of its inputs, [B, n].
        backend: computes the layers' maps.
        norms_ran_first: of each layer that was read; see `AttentionTrace`.
        mismatches: of each layer that was read, a scalar tensor; see `Backend.residual_mismatch`.
        stale_cache_flags: of the layers that were read; see `AttentionTrace`.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], backend: str = "torch"):
        self.encoder = Encoder.of(model)
        self.inputs = by_name(self.encoder.model, inputs)
        self.mask = check_inputs(self.encoder, inputs)
        self.backend = choose_backend(backend, self.mask, self.encoder.layers)
        self.norms_ran_first: list[bool] = []
        self.mismatches: list[Tensor] = []
        self.stale_cache_flags: list[Tensor] = []
        self._prepared = False  # whether the model is changed and locked

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores: float64 for float64 models, float32 for all others."""
        return torch.float64 if self.encoder.model.dtype == torch.float64 else torch.float32

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
        family = self.encoder.family
        if family.pre_norm and stage is not None and stage.norms == 1:
            raise ValueError(
                f"method {stage.name!r} has no meaning for {family.model_type!r}: no LayerNorm follows its "
                "residual sums (pre-LN); N-Enc and N-Res are what a token adds to the residual stream"
            )

    def check_position(self, position: Position) -> None:
        """Raises ValueError where a named position does not exist in the family."""
        family = self.encoder.family
        if isinstance(position, str) and position == "cls" and not family.has_cls:
            raise ValueError(
                f"position 'cls' has no meaning for {family.model_type!r}: no token of it stands for the whole; "
                "use position='mean', or a number"
            )

    def run(self, consumer: LayerConsumer) -> Any:
        """Show every layer to `consumer`, which calls `check` on each, and return the model's output."""
        self.norms_ran_first, self.mismatches, self.stale_cache_flags = [], [], []
        model, consumer = self.encoder.model, _InFullPrecision(consumer, self.mask.device)

        def captured() -> Any:
            with returning_tuples(model):
                return capture(self.encoder, self.inputs, self.mask, consumer, self.backend.attention)

        return self.prepared(captured)

    def prepared(self, body: Callable[[], T]) -> T:
        """body(), while the model is changed as its forward pass over so many tokens would change it."""
        model, prepare = self.encoder.model, self.encoder.family.prepare
        if prepare is None or self._prepared:
            return body()
        loan, base_model = Loan(), model.base_model

        def changed() -> T:
            loan.one_at_a_time(base_model)
            change = prepare(base_model, self.mask.shape[1])
            if change is not None:
                loan.change(*change)
            self.encoder, self._prepared = Encoder.of(model), True
            return body()

        try:
            return loan.run(changed)
        finally:
            self._prepared = False

    def check(self, trace: AttentionTrace) -> None:
        """Note what `with_fresh_weights` and `check_residuals` read when all layers are done, so that a GPU need not be
        waited for layer by layer."""
        self.norms_ran_first.append(trace.norm_ran_first)
        self.mismatches.append(self.backend.residual_mismatch(trace).to(self.mask.device))
        self.stale_cache_flags.extend(flag.to(self.mask.device) for flag in trace.stale_cache_flags)

    def with_fresh_weights(self, compute: Callable[[], T]) -> T:
        """compute(), which calls `run`; again where a cached tensor turns out to be of other weights.

        Raises:
            RuntimeError: the weights do not stand still.
            torch.OutOfMemoryError: the device's memory is too small; the message says what to lower.
        """
        try:
            for _ in range(3):
                result = Loan().run(compute)
                if not self.stale_cache_flags or not bool(torch.stack(self.stale_cache_flags).any()):
                    return result
                for layer in self.encoder.layers:
                    invalidate(layer)
        except torch.OutOfMemoryError as error:
            batch, n = self.mask.shape
            raise torch.OutOfMemoryError(
                f"out of memory on {self.mask.device} with {batch} texts of {n} tokens: take fewer texts at once, cut "
                "them shorter, load the model in half precision (dtype=torch.bfloat16), and ask for position='all', "
                f"maps and backend='reference' only where n x n numbers fit; {str(error).splitlines()[0]}"
            ) from error
        raise RuntimeError("the model's weights change during the call: attribute when they stand still")

    def check_residuals(self) -> None:
        """Whether the parts are those of the layers' outputs.

        Raises:
            RuntimeError: the family's names do not fit the model.
            ValueError: something of the caller's changes what flows from the attention to the first LayerNorm.
        """
        if any(self.norms_ran_first):
            raise wrong_norm(self.norms_ran_first.index(True))
        wrong = torch.stack(self.mismatches) > 1
        if bool(wrong.any()):
            raise ValueError(
                f"layer {int(wrong.nonzero()[0])}: what enters the first LayerNorm is not the residual plus the "
                "output projection of the attention; a hook or a replaced forward changes it in between (remove it, or "
                "patch the value vectors or the layer's input instead), or the encoder family's names are wrong; "
                "completeness_gap shows by how much"
            )


class WholeLayers(ABC):
    """A consumer that reads each layer when it is complete, and checks it."""

    def __init__(self, forward_pass: ForwardPass):
        self.forward_pass = forward_pass
        self._incomplete: dict[int, AttentionTrace] = {}

    @abstractmethod
    def read(self, trace: LayerTrace) -> None:
        """Use a complete layer, which comes in order."""

    def attention_done(self, index: int, trace: AttentionTrace) -> None:
        """As `LayerConsumer`."""
        self._incomplete[index] = trace

    def layer_done(self, index: int, end: LayerEnd) -> None:
        """As `LayerConsumer`."""
        trace = self._incomplete.pop(index).completed(end)
        self.read(trace)
        self.forward_pass.check(trace)


class LayerValues(WholeLayers):
    """What a function returns for each layer, in `values`."""

    def __init__(self, forward_pass: ForwardPass, value_of: Callable[[LayerTrace], Tensor]):
        super().__init__(forward_pass)
        self.value_of = value_of
        self.values: list[Tensor] = []

    def read(self, trace: LayerTrace) -> None:
        """As `WholeLayers.read`."""
        self.values.append(self.value_of(trace))


class _InFullPrecision:
    """A consumer whose numbers keep their own precision, whatever the caller's autocast and TF32 settings say."""

    def __init__(self, consumer: LayerConsumer, device: torch.device):
        self.consumer, self.device = consumer, device

    def attention_done(self, index: int, trace: AttentionTrace) -> None:
        with precise(self.device):
            self.consumer.attention_done(index, trace)

    def layer_done(self, index: int, end: LayerEnd) -> None:
        with precise(self.device):
            self.consumer.layer_done(index, end)


def require_finite(values: Tensor) -> Tensor:
    """The values, all of them finite.

    Raises:
        FloatingPointError: some are not.
    """
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(
            "the attribution is not finite: the model's activations or weights hold NaN or infinity "
            "(a float16 model overflows easily: load it with dtype=torch.float32 or torch.bfloat16)"
        )
    return values
