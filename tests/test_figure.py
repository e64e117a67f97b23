"""Figures of a sensible size, on a scale that hides nothing."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from render_cases import Parsed, alpha, attribution, printed, whole

from globenc.render.figure import figure
from globenc.render.html import page
from globenc.render.token_labels import token_labels


def titles(drawn: Figure) -> list[str]:
    return [axes.get_title() for axes in drawn.axes if axes.get_title()]


def test_figure_has_a_bar_for_each_token():
    a = attribution()
    (axes,) = figure(a).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(list(a.scores))
    assert [label.get_text() for label in axes.get_xticklabels()] == token_labels(a)
    assert axes.patches[0].get_facecolor() == axes.patches[-1].get_facecolor() != axes.patches[1].get_facecolor()


def test_words_set_the_scale_of_bars_and_what_goes_beyond_is_cut_and_told():
    a = attribution("low high", layers=3, scores=[0.99, 0.001, 0.008, 0.001])
    bars, heat = figure(a).axes[:2]
    assert 0.008 < bars.get_ylim()[1] < 0.01
    assert [text.get_text() for text in bars.texts] == ["0.99"]
    assert "cut where they go beyond" in bars.get_title()
    assert heat.images[0].get_clim()[1] == pytest.approx(0.008)
    (plain,) = figure(attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])).axes
    assert not plain.texts
    assert "cut" not in plain.get_title()


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 4, [1.0, 0, 0, 0], [1 - 1e-12, 1e-13, 9e-13, 0.0], [0, 1.0, 0, 0]],
    ids=["all-zero", "words-zero", "skewed", "one-word"],
)
def test_extreme_scores_are_drawn(scores, tmp_path):
    a = attribution("low high", layers=2, scores=scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.plot(tmp_path / "a.png")
        source, out = page(a), printed(a, color_system=None)
    assert len(Parsed(source).words) == 2
    assert "low " in out
    if 0 < scores[2] < 1e-9:
        assert re.search(r"^high +9\.0e-11%", out, re.M)
        assert "9.00e-13" in source


def test_what_a_token_keeps_for_itself_does_not_hide_the_others():
    """Positions that keep nearly everything, as in some pre-LN models: the scale is that of the others."""
    n = len(attribution().tokens)
    kept = np.full((n, n), 0.002) + (1 - 0.002 * n) * np.eye(n)
    kept[1, 2] = 0.004
    a = replace(whole(), scores=kept)
    assert figure(a).axes[1].images[0].get_clim()[1] == pytest.approx(0.004)
    assert "highest share of a token in another one, 0." in page(a)
    one = replace(attribution("low high", scores=[0.001, 0.99, 0.008, 0.001]), position=1)
    assert [round(alpha(style), 3) for _, _, style in Parsed(page(one)).words] == [0.6, 0.6]
    assert "highest word besides the position, 0.80%" in page(one)
    assert "width:100.0%" in page(one)
    assert not re.search(r"width:\d{4,}", page(one))


def test_figure_with_layers_has_the_heat_map():
    a = attribution(layers=4)
    heat = figure(a).axes[1]
    assert heat.get_title() == "Share of each token in [CLS], layer by layer"
    assert np.allclose(heat.images[0].get_array(), a.layer_scores)
    assert heat.images[0].origin == "lower"


def test_figure_of_several_positions_and_of_the_whole_matrix():
    several = attribution(positions=3, position=[0, 1, 2], layers=2)
    assert np.allclose(figure(several).axes[0].images[0].get_array(), several.scores)
    assert len(titles(figure(several))) == 1 + 3
    matrix = whole()
    assert np.allclose(figure(matrix).axes[1].images[0].get_array(), matrix.scores)


@pytest.mark.parametrize("make", [attribution, whole], ids=["cls", "all"])
@pytest.mark.parametrize("n", [1, 60, 510])
def test_figure_is_never_huge(make, n, tmp_path):
    drawn = figure(make(" ".join(f"word{k}" for k in range(n)), layers=24))
    width, height = drawn.get_size_inches()
    assert 6 <= width <= 18
    assert 3 <= height <= 32
    assert max(len(axes.get_xticklabels()) for axes in drawn.axes) <= 64


def test_plot_writes_a_picture(tmp_path):
    a = attribution("Costs $5 and $6 _{x} ^", layers=6)
    assert a.plot(tmp_path / "a.png").axes
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    assert 600 < width < 3000
    assert 400 < height < 2000
    a.plot(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a.xyz", "a"])
def test_plot_refuses_unknown_endings(name, tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of .*\.png"):
        attribution().plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_plot_warns_once_of_missing_glyphs(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attribution("\U0001e900 \U0001e901 end").plot(tmp_path / "a.png")
    assert [str(w.message) for w in caught] == [
        "a.png has boxes in place of 2 of the characters: no installed font has them"
    ]
    assert caught[0].filename == __file__


def test_plot_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    attribution().plot(tmp_path / "a.png")
    assert plt.get_fignums() == []
