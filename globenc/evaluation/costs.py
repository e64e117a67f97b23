"""What methods cost, in forward passes over the same texts: measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Costs:
    """Times of methods beside those of plain forward passes.

    On a CPU it is the process's time on it, which other programs change little, and on a GPU the time that passes.

    Args:
        device: of the model.
        clock: seconds; None goes by the device.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None):
        self.device = device
        self.clock = clock or (time.process_time if device.type == "cpu" else time.perf_counter)
        self._forward = 0.0  # seconds of the present batch's forward pass
        self._sums: dict[str, list[float]] = {}

    def begin(self, forward: Callable[[], object]) -> None:
        """Time the plain forward pass of a batch, with which the methods' times are compared until the next one."""
        if not self._forward:
            forward()  # a first pass is slower
        self._forward = self._seconds(forward)[0]

    def measure(self, name: str, run: Callable[[], T]) -> T:
        """run(), timed as a method's work on the batch."""
        seconds, result = self._seconds(run)
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += seconds
        sums[1] += self._forward
        return result

    def in_forward_passes(self) -> dict[str, float]:
        """Time of each method over that of the forward passes of the same batches."""
        return {name: seconds / forward for name, (seconds, forward) in self._sums.items() if forward > 0}

    def _seconds(self, run: Callable[[], T]) -> tuple[float, T]:
        self._wait()
        start = self.clock()
        result = run()
        self._wait()
        return self.clock() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
