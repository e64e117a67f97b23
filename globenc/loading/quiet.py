"""No progress bar and no table of transformers' while it fills a model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

from .private_transformers import MODELING_LOGGER, REPORTS, silence_progress_bars

_silenced: ContextVar[bool] = ContextVar("silenced", default=False)


class _ReportFilter(logging.Filter):
    """Without transformers' reports on weights, where those are looked at here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (_silenced.get() and any(words in str(record.msg) for words in REPORTS))


_report_filter = _ReportFilter()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bar and no table of transformers' in this thread while it fills a model; other threads keep theirs."""
    logging.getLogger(MODELING_LOGGER).addFilter(_report_filter)
    silence_progress_bars(_silenced)
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)
