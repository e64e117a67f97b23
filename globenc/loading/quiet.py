"""No progress bar and no table of transformers' while it fills a model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from transformers.utils import logging as transformers_logging

_said_by_us: ContextVar[bool] = ContextVar("said_by_us", default=False)


class _ReportFilter(logging.Filter):
    """Without transformers' table of missing weights and its word on tied ones, where those are looked at here."""

    def filter(self, record: logging.LogRecord) -> bool:
        about = ("LOAD REPORT", "The tied weights mapping")
        return not (_said_by_us.get() and any(words in str(record.msg) for words in about))


_report_filter = _ReportFilter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bar and no table of transformers' in this thread while it fills a model; other threads keep theirs."""
    logging.getLogger("transformers.modeling_utils").addFilter(_report_filter)
    earlier = transformers_logging._tqdm_hook
    if not isinstance(earlier, _BarHook):
        transformers_logging.set_tqdm_hook(_BarHook(earlier))
    token = _said_by_us.set(True)
    try:
        yield
    finally:
        _said_by_us.reset(token)


class _BarHook:
    """No progress bar where `_said_by_us`; else what was there before."""

    def __init__(self, earlier: Any):
        self._earlier = earlier

    def __call__(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _said_by_us.get():
            return transformers_logging.EmptyTqdm(*args, **kwargs)
        return factory(*args, **kwargs) if self._earlier is None else self._earlier(factory, args, kwargs)
