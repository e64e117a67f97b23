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


FOR_AND_AGAINST = {"scores": [0.2, 0.1, 0.3, 0.3, 0.1], "class_scores": [-0.5, 0.1, 2.0, -1.0, 0.25]}


def test_terminal_says_what_was_asked_and_answered_first():
    lines = printed(attribution("low high bad", **FOR_AND_AGAINST), color_system=None).splitlines()
    assert lines[:3] == [
        "positive 75.0%",
        'Which words speak for "positive", and which against it?',
        "logit 1.35 = words for 2.35 - words against 1.50 + rest 0.50",
    ]


def test_terminal_table_has_class_scores_on_one_scale_beside_shares():
    out = printed(attribution("low high bad", **FOR_AND_AGAINST), color_system=None)
    lines = out.splitlines()
    (first,) = [k for k, line in enumerate(lines) if line.startswith("high")]
    assert lines[first - 1].split() == ["word", "logit", "against", "for", "share"]
    assert lines[first].split() == ["high", "+2.00", "│" + "█" * 12, "30.0%"]
    assert lines[first + 1].split() == ["bad", "-1.00", "█" * 6 + "│", "30.0%"]
    assert lines[first + 2].split() == ["low", "+0.10", "│▌", "10.0%"]
    assert len({line.index("│") for line in lines[first : first + 3]}) == 1
    assert "special tokens: -0.25, 30.0% ([CLS] -0.50, 20.0%; [SEP] +0.25, 10.0%)" in lines
    assert "it says how much, not for or against" in " ".join(out.split())
    assert "5 tokens." in out


def test_terminal_colours_the_text_blue_for_and_orange_underlined_against():
    a = attribution("low high bad", scores=[0.2] * 5, class_scores=[0.0, 0.1, 2.0, -2.0, 0.0])
    out = printed(a, force_terminal=True, color_system="truecolor")
    assert re.search(r"low \x1b\[1;30;48;2;64;156;255mhigh\x1b", out)
    assert re.search(r"\x1b\[1;4;30;48;2;240;128;40mbad\x1b", out)


def test_terminal_what_the_class_score_table_leaves_out_is_summed_up():
    scores = [0.0, *(float(k) for k in range(1, 21)), 0.0]
    out = printed(attribution(" ".join(f"w{k}" for k in range(20)), class_scores=scores), top=3, color_system=None)
    assert len(re.findall(r"^w\d+ ", out, re.M)) == 3
    assert re.search(r"17 other words: \+153\.0, \d", out)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_terminal_class_scores_fit_the_width(width):
    text = "a remarkably-unpronounceable-and-long-one incomprehensibilities"
    n = len(attribution(text).tokens)
    a = attribution(text, layers=2, class_scores=[(-1.0) ** k * 1234.5 * k for k in range(n)])
    out = printed(a, width=width, color_system=None)
    assert max(len(line) for line in out.splitlines()) <= width
    table = out[: out.index("other word")].splitlines()
    rows = [line for line in table if "│" in line]
    assert len(rows) == 10
    assert all(re.search(r" [+-]\d{1,2},\d{3} .* \d+\.\d%$", line) for line in rows)


def test_terminal_several_positions_have_one_table_of_class_scores():
    a = attribution(positions=2, position=[0, 1], class_scores=[0.0, 1.0, -1.0, 0.5, 0.0])
    out = printed(a, color_system=None)
    assert out.count("against for") == 1
    assert out.index("against for") < out.index("to [CLS] (token 0)") < out.index("to A (token 1)")


def test_terminal_class_scores_steer_nothing_and_work_in_ascii():
    a = replace(
        attribution("bad word", class_scores=[0.0, -1.0, 1.0, 0.0]), text="b\x1bd word", explained_label="p\x1b[1m"
    )
    assert "\x1b" not in printed(a, color_system=None)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace"), width=80)
    show(a, console)
    console.file.seek(0)
    written = console.file.read()
    assert "#" * 12 + "|" in written
    assert "|" + "#" * 12 in written
