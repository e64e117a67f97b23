"""What a call changes in the caller's model, process and thread, and how all of it is restored.

An interrupt may come between any two steps: a change is noted before it is made, and restoring may be cut short and
done again.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

ATTENTION = "globenc_capture"  # the name of the attention that `capture` registers

T = TypeVar("T")


_lock = threading.RLock()  # of everything borrowed; held for a few assignments


class _Borrowed:
    """An attribute of shared objects, changed by the first borrower and restored by the last one.

    Models share configurations and threads share models, so that saving and restoring by each capture on its own
    would put back what another one has set.
    """

    def __init__(self, attribute: str, value: object):
        self.attribute, self.value = attribute, value
        self._taken: dict[int, tuple[object, Any, set[object]]] = {}  # by id: object, original, borrowers

    def __contains__(self, thing: object) -> bool:
        return id(thing) in self._taken

    def original(self, thing: object) -> Any:
        """The attribute as the caller has set it."""
        taken = self._taken.get(id(thing))
        return getattr(thing, self.attribute) if taken is None else taken[1]

    def take(self, borrower: object, things: Sequence[object]) -> None:
        with _lock:
            for thing in things:
                if id(thing) not in self._taken:
                    self._taken[id(thing)] = thing, getattr(thing, self.attribute), set()
                self._taken[id(thing)][2].add(borrower)
                self._change(thing)

    def give_back(self, borrower: object) -> None:
        """Give back all that a borrower has; where that was cut short, once more."""
        if not self._taken:
            return
        with _lock:
            for key, (thing, original, borrowers) in list(self._taken.items()):
                borrowers.discard(borrower)
                if not borrowers:
                    setattr(thing, self.attribute, original)
                    del self._taken[key]

    def _change(self, thing: object) -> None:
        setattr(thing, self.attribute, self.value)


class _BorrowedPrecision(_Borrowed):
    def _change(self, thing: object) -> None:
        """Set it; where it only followed a more general setting, "none" is what will be restored."""
        _, original, borrowers = self._taken[id(thing)]
        unchanged = getattr(thing, self.attribute) == original
        if self.attribute == "fp32_precision" and unchanged and original not in ("none", self.value):
            setattr(thing, self.attribute, "none")
            if getattr(thing, self.attribute) == original:
                self._taken[id(thing)] = thing, "none", borrowers
        setattr(thing, self.attribute, self.value)


_evaluating = _Borrowed("training", False)
_frozen = _Borrowed("requires_grad", False)
_captured = _Borrowed("_attn_implementation_internal", ATTENTION)
_eager = _Borrowed("_compiled_call_impl", None)
_products: list[Any] = [torch.backends.cuda.matmul]
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    _products += [torch.backends.mkldnn.matmul]  # type: ignore[attr-defined, unused-ignore]
    _precise = _BorrowedPrecision("fp32_precision", "ieee")
else:  # torch < 2.9
    _precise = _BorrowedPrecision("allow_tf32", False)
_FULL = ("ieee", "none", False)


def lowers_float32(device: torch.device) -> bool:
    """Whether the caller lets matrix products in float32 on a device round to TF32 or bfloat16."""
    if len(_products) == 1:  # torch < 2.9
        return torch.get_float32_matmul_precision() != "highest" or bool(_precise.original(_products[0]))
    matmul, mkldnn = (_precise.original(product) for product in _products)
    return (mkldnn if device.type == "cpu" else matmul) not in _FULL


@contextlib.contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Numbers keep their own precision inside, whatever the caller's autocast and TF32 settings say."""
    autocast, name = torch.is_autocast_enabled(device.type), _precise.attribute
    lowered = [product for product in _products if product in _precise or getattr(product, name) not in _FULL]
    outermost = not getattr(_thread, "precise", False)
    try:
        if autocast:  # not torch.autocast, whose count of nested contexts an interrupt could leave wrong
            torch.set_autocast_enabled(device.type, False)
        if lowered and outermost:
            _thread.precise = True
            _precise.take(threading.get_ident(), lowered)
        yield
    finally:
        if outermost:
            _leave_precise()
        if autocast:
            torch.set_autocast_enabled(device.type, True)


def _leave_precise() -> None:
    _precise.give_back(threading.get_ident())
    _thread.precise = False


_thread = threading.local()  # .precise: whether this thread is inside `precise`; .recorder: see `active_recorder`


def active_recorder() -> Any:
    """What the layers of this thread's forward pass are shown to; None outside of a capture."""
    return getattr(_thread, "recorder", None)


_models: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # locks; see Loan.one_at_a_time


def _release(lock: threading.RLock) -> None:
    """Release a lock where this thread holds it, even if an interrupt came between an acquire and its release."""
    with contextlib.suppress(RuntimeError):
        while True:
            lock.release()


class Loan:
    """What one call borrows. `run` gives back everything, and the thread's gradient and autocast modes with it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._grad, self._recorder = torch.is_grad_enabled(), active_recorder()
        self._precise = getattr(_thread, "precise", False)
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}

    def run(self, body: Callable[[], T]) -> T:
        """body(), which borrows; an interrupt that cuts the giving back short finds it done a second time."""
        try:
            try:
                return body()
            finally:
                self._give_back()
        finally:
            self._give_back()

    def change(self, do: Callable[[], Any], undo: Callable[[], None]) -> None:
        """do(); undo(), which must bear to be called again, belongs to what is given back."""
        self._undo.append(undo)
        do()

    def one_at_a_time(self, model: nn.Module) -> None:
        """Wait for other threads' calls: this model cannot serve two at once."""
        with _lock:
            lock = _models.setdefault(model, threading.RLock())
        self.change(lock.acquire, lambda: _release(lock))

    def evaluation_mode(self, modules: list[nn.Module]) -> None:
        """No dropout, and no compiled module: hooks see tensors."""
        _evaluating.take(self, [module for module in modules if module.training or module in _evaluating])
        compiled = [module for module in modules if module._compiled_call_impl is not None or module in _eager]
        _eager.take(self, compiled)

    def no_parameter_gradients(self, model: nn.Module) -> None:
        """Gradients flow through the model, and its parameters get none."""
        parameters = [p for p in model.parameters() if p.requires_grad or p in _frozen]
        # those that were made in inference mode get none anyway, and could not be given back
        _frozen.take(self, [p for p in parameters if not p.is_inference()])

    def attention(self, modules: list[nn.Module]) -> None:
        """The capturing attention in the place of the model's."""
        # layers may have a configuration of their own
        owners = [getattr(module, "config", None) for module in modules]
        configs = {id(config): config for config in owners if isinstance(config, PreTrainedConfig)}
        _captured.take(self, list(configs.values()))

    def recorder(self, recorder: object) -> None:
        """What the layers of this thread's forward passes are shown to."""
        _thread.recorder = recorder

    def hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        """register(hook, **options), where `register` is a module's method for hooks."""
        module = register.__self__  # type: ignore[attr-defined]
        self.change(lambda: register(hook, **options), lambda: _unhook(module, hook))

    def _give_back(self) -> None:
        while self._undo:  # each once: behind a lock's release the model is another thread's
            self._undo[-1]()
            del self._undo[-1]
        for borrowed in (_evaluating, _eager, _frozen, _captured):
            borrowed.give_back(self)
        if not self._precise:
            _leave_precise()
        _thread.recorder = self._recorder
        if torch.is_grad_enabled() != self._grad:
            torch.set_grad_enabled(self._grad)
        for kind, enabled in self._autocast.items():
            if torch.is_autocast_enabled(kind) != enabled:
                torch.set_autocast_enabled(kind, enabled)
        _release(_lock)


def _unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Take a hook off a module, however far its registration went."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, known in list(table.items()) if known == hook]:  # other threads hook too
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            del table[key]
