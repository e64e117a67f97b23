"""Figures of a sensible size, on a scale that hides nothing."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from render_cases import Parsed, alpha, attribution, printed, whole

from globenc.render.figure import AGAINST, FOR, figure
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


CLASS_SCORES = [-0.5, 0.25, 2.0, -1.0, 5.0]


def test_class_scores_are_bars_from_zero_on_one_scale_above_the_shares():
    a = attribution(class_scores=CLASS_SCORES, layers=2)
    signed, shares, heat = figure(a).axes[:3]
    bars = sorted(signed.patches, key=lambda bar: bar.get_x())
    assert [bar.get_height() for bar in bars] == pytest.approx(CLASS_SCORES)
    low, high = signed.get_ylim()
    assert -low == high == pytest.approx(2.2)
    assert [text.get_text() for text in signed.texts] == ["5"]
    assert [bool(bar.get_hatch()) for bar in bars] == [score < 0 for score in CLASS_SCORES]
    assert bars[2].get_facecolor()[:3] == pytest.approx(FOR[:3])
    assert bars[3].get_facecolor()[:3] == pytest.approx(AGAINST[:3])
    assert bars[0].get_facecolor()[3] < 1 == bars[2].get_facecolor()[3]
    assert signed.get_ylabel() == "logits"
    assert [bar.get_height() for bar in shares.patches] == pytest.approx(list(a.scores))
    colours = {tuple(bar.get_facecolor()[:3]) for bar in shares.patches}
    assert FOR[:3] not in colours
    assert heat.images[0].get_cmap().name == "Greys"


def test_figure_says_what_was_asked_and_answered():
    title = figure(attribution(class_scores=CLASS_SCORES))._suptitle.get_text()  # type: ignore[union-attr]
    assert 'Which words speak for "positive", and which against it?' in title.replace("\n", " ")
    assert "logit 6.25 = words for 7.25 \N{MINUS SIGN} words against 1.50 + rest 0.50" in title.replace("\n", " ")


def test_panels_of_a_long_text_have_the_same_tokens():
    n = 200
    scores = np.random.default_rng(1).normal(size=n + 2).tolist()
    signed, shares = figure(attribution(" ".join("w" * n), class_scores=scores)).axes
    assert len(signed.patches) == len(shares.patches) == 64
    heights = sorted((abs(bar.get_height()) for bar in signed.patches), reverse=True)
    assert heights == pytest.approx(sorted(np.abs(scores).tolist(), reverse=True)[:64])
    for axes in (signed, shares):
        assert "the 64 strongest of 202 tokens in order of the text" in axes.get_title()


def test_a_pdf_has_truetype_fonts_and_an_svg_letters(tmp_path):
    a = attribution("caf\u00e9 <b>& $x$ ]]>", class_scores=[float(k) for k in range(-7, 6)])
    drawn = a.plot(tmp_path / "a.pdf")
    a.plot(tmp_path / "a.svg")
    drawn.savefig(tmp_path / "b.pdf")
    for name in ("a.pdf", "b.pdf"):
        source = (tmp_path / name).read_bytes()
        assert b"/CIDFontType2" in source
        assert b"/Type3" not in source
    written = ElementTree.parse(tmp_path / "a.svg").getroot()
    letters = {element.text for element in written.iter("{http://www.w3.org/2000/svg}text")}
    assert {"caf\u00e9", "&", "$", "<"} <= letters
    assert matplotlib.rcParams["svg.fonttype"] == "path"
    assert matplotlib.rcParams["pdf.fonttype"] == 3


def test_a_notebook_shows_the_figure_without_a_backend():
    assert attribution().plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("class_scores", [None, CLASS_SCORES], ids=["shares", "class scores"])
def test_plot_into_axes_of_ones_own(class_scores, tmp_path):
    own = Figure()
    left, right = own.subplots(1, 2)
    a = attribution(class_scores=class_scores)
    assert a.plot(tmp_path / "a.png", ax=left) is own
    expected = list(a.scores) if class_scores is None else class_scores
    assert sorted(bar.get_height() for bar in left.patches) == pytest.approx(sorted(expected))
    assert not right.patches
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes, got Figure"):
        a.plot(ax=own)


def test_plot_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    attribution().plot(tmp_path / "a.png")
    assert plt.get_fignums() == []
