"""Memory stays linear in the text's length: peaks measured in processes of their own by the benchmarks' harness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent.parent / "bench" / "harness.py"


def peak_mb(n: int, what: str) -> float:
    command = [sys.executable, str(HARNESS), "2 layers, d=768", str(n), what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_linear():
    """At 4,096 tokens an n x n x heads tensor alone would take 805 MB, an n x n one 67 MB a layer."""
    forward, short, long = peak_mb(4096, "forward"), peak_mb(4096, "globenc"), peak_mb(8192, "globenc")
    assert short - forward <= 300
    assert long <= 2 * short + 80  # the allocator's noise; one n x n float32 tensor would add 268 MB to the longer
    assert peak_mb(512, "direct sum") > peak_mb(512, "globenc") + 600  # the harness does see what is stored
