"""Memory stays linear in the text's length: peaks measured in processes of their own by the benchmarks' harness."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent.parent / "bench" / "harness.py"


def peak_mb(n: int, what: str, **environment: str) -> float:
    command = [sys.executable, str(HARNESS), "2 layers, d=768", str(n), what]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_linear():
    """At 4,096 tokens an n x n x heads tensor alone would take 805 MB, an n x n one 67 MB a layer."""
    forward, short, long = peak_mb(4096, "forward"), peak_mb(4096, "globenc"), peak_mb(8192, "globenc")
    assert short - forward <= 300
    assert long <= 2 * short + 80  # the allocator's noise; one n x n float32 tensor would add 268 MB to the longer
    assert peak_mb(512, "direct sum") > peak_mb(512, "globenc") + 600  # the harness does see what is stored


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("reference", ["zero", "origin"])
def test_memory_of_class_scores_is_linear(reference):
    """Of each layer stay its queries and keys, and what activations read and put out: 50 MB each here.

    Blocks from 1 MB on go back to the system when they are freed: what glibc's heap would keep of them depends on their
    order, and is up to 200 MB.
    """
    what, options = f"class scores, {reference}", {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    forward = peak_mb(4096, "forward", **options)
    short, long = (peak_mb(n, what, **options) for n in (4096, 8192))
    assert short - forward <= 500
    assert long <= 2 * short + 80


LONGEST = """
import sys, torch, transformers, globenc
from pathlib import Path

n = int(sys.argv[1])
config = transformers.NomicBertConfig(
    vocab_size=1000, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=64, intermediate_size=256,
    max_position_embeddings=n, pad_token_id=0,
)
model = transformers.NomicBertModel(config).eval()
tokens = torch.randint(5, 1000, (1, n))
globenc.attribute(model, input_ids=tokens[:, :64])

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
scores = globenc.attribute(model, input_ids=tokens).scores
assert scores.shape == (1, n) and abs(float(scores.double().sum()) - 1) < 1e-4
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_131072_tokens():
    """One n x n float32 tensor would take 68 GB."""
    peaks = []
    for n in (65_536, 131_072):
        done = subprocess.run([sys.executable, "-c", LONGEST, str(n)], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] <= 2 * peaks[0] + 80
    assert peaks[1] < 1500
