from __future__ import annotations

import pytest
from harness import circumstances, write_rows

_rows: dict[str, list[dict[str, str]]] = {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Rows of a file of benchmarks; they become bench/results/<its RESULTS>.csv when every benchmark has passed."""
    return _rows.setdefault(request.module.RESULTS, [])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0:
        common = circumstances() if _rows else {}
        for name, rows in _rows.items():
            path = write_rows(name, [{**row, **common} for row in rows])
            print(f"\nwrote {len(rows)} rows to {path}")
