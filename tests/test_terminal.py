"""Terminals with and without colour: the table, its bars, the layers."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from render_cases import attribution, printed, whole
from rich.console import Console

from globenc.render.terminal import show


def test_terminal_without_colour_is_a_ranked_table_with_bars():
    a = attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])
    lines = printed(a, color_system=None).splitlines()
    assert lines[0] == "positive 75.0%"
    (high,) = [k for k, line in enumerate(lines) if line.startswith("high")]
    assert lines[high].split() == ["high", "60.0%", "█" * 24]
    assert lines[high + 1].split() == ["low", "10.0%", "█" * 4]
    assert "special tokens: 30.0% ([CLS] 20.0%, [SEP] 10.0%)" in lines
    assert "\x1b" not in "\n".join(lines)


def test_terminal_with_colour_shows_the_text_with_its_highest_word_strongest():
    a = attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])
    out = printed(a, force_terminal=True, color_system="truecolor")
    assert re.search(r"low \x1b\[1;30;48;2;64;156;255mhigh\x1b", out)
    assert "\x1b[1;30;48" not in printed(a, force_terminal=True, color_system="truecolor", no_color=True)


def test_terminal_steers_nothing_by_the_text():
    a = replace(attribution("bad word"), text="b\x1bd word")
    assert "\x1b" not in printed(a, color_system=None)


def test_terminal_table_is_as_long_as_asked_and_the_rest_is_summed_up():
    a = attribution(" ".join(f"w{k}" for k in range(20)))
    rest = sum(sorted(word.score for word in a.words() if not word.special)[:17])
    out = printed(a, top=3, color_system=None)
    assert len(re.findall(r"^w\d+ ", out, re.M)) == 3
    assert re.search(rf"17 other words: {rest:.1%}", out)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("layers", [2, 12, 48])
def test_terminal_layers_fit_the_width_and_end_with_the_last(layers, width):
    out = printed(attribution(layers=layers), width=width, color_system=None)
    header = [line for line in out.splitlines() if line.startswith("word")][1]
    assert header.split()[-1] == str(layers)
    assert header.split()[1] == "1"
    assert max(len(line) for line in out.splitlines()) <= width


def test_terminal_several_positions_whole_matrix_and_truncation():
    out = printed(attribution(positions=2, position=[0, 1]), color_system=None)
    assert "to [CLS] (token 0)" in out
    assert "to A (token 1)" in out
    assert "to all tokens on average" in printed(whole(), color_system=None)
    assert "5 of 10 tokens (50%) were cut off" in printed(attribution(truncated=5), color_system=None)


def test_terminal_in_ascii():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace"), width=80)
    show(attribution("low high", scores=[0.2, 0.1, 0.6, 0.1]), console)
    console.file.seek(0)
    assert "#" * 24 in console.file.read()
