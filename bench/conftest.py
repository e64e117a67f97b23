from __future__ import annotations

import pytest
from harness import circumstances, write_rows

_rows: list[dict[str, str]] = []


@pytest.fixture
def record() -> list[dict[str, str]]:
    """Rows of this run; they become bench/results/cpu.csv when every benchmark has passed."""
    return _rows


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _rows and exitstatus == 0:
        common = circumstances()
        path = write_rows("cpu", [{**row, **common} for row in _rows])
        print(f"\nwrote {len(_rows)} rows to {path}")
