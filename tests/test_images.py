"""Images through the front door: processors, results, heat maps, the command line."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from helpers import randomize, tiny_vision
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import globenc
from globenc.cli import app
from globenc.render import image

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random ViT classifier with its processor."""
    where = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(**SIZES, id2label={0: "cat", 1: "dog"})
    model = transformers.ViTForImageClassification(config)
    randomize(model)
    model.save_pretrained(where)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def explainer(folder):
    return globenc.GlobEnc.from_pretrained(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_an_image(explainer, photo):
    a = explainer(photo, per_layer=True)
    assert a.grid == (4, 4)
    assert a.tokens[:3] == ["[CLS]", "0,0", "0,1"]
    assert a.image.shape == (16, 16, 3)
    assert a.label in ("cat", "dog")
    assert a.scores.sum() == pytest.approx(1)
    assert a.patches().shape == (4, 4)
    assert a.layer_scores.shape == (2, 17)
    assert a.patches().sum() + a.special_share() == pytest.approx(1)
    heat = a.heat_map()
    assert heat.shape == (16, 16)
    for row in range(4):
        for column in range(4):
            block = heat[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert (block == a.scores[1 + 4 * row + column]).all()
    pixels = explainer.tokenizer(Image.open(photo), return_tensors="pt")["pixel_values"]
    out = globenc.attribute(explainer.model, pixel_values=pixels)
    np.testing.assert_allclose(a.scores, out.scores[0].numpy(), rtol=1e-5)
    with torch.no_grad():
        probability = explainer.model(pixel_values=pixels).logits.double().softmax(-1).max()
    assert a.probability == pytest.approx(float(probability), rel=1e-5)


def test_what_the_model_saw(explainer, photo):
    expected = np.asarray(Image.open(photo).resize((16, 16), Image.Resampling.BILINEAR), np.int16)
    assert np.abs(explainer(photo).image - expected).max() <= 2


def test_every_kind_of_image(explainer, photo):
    array = np.asarray(Image.open(photo))
    kinds = [photo, str(photo), Image.open(photo), array, torch.tensor(array)]
    results = explainer(kinds)
    for result in results[1:]:
        np.testing.assert_array_equal(result.scores, results[0].scores)
    assert explainer(array[..., 0]).grid == (4, 4)  # grey
    assert explainer(np.dstack([array, array[..., :1]])).grid == (4, 4)  # with an alpha channel


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("no-such-file.png", OSError, "image 'no-such-file.png' cannot be read: No such file"),
        (__file__, OSError, "is in no format that is known here"),
        (3, TypeError, "the image must be a path, a PIL image or an array, got int"),
        ([3], TypeError, r"images\[0\] must be a path"),
        ([], ValueError, "images is an empty list"),
        (np.zeros((4, 4, 3)), ValueError, r"uint8 of shape \[height, width, 3\], got float64 \[4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "uint8 of shape"),
        (np.zeros((3, 4, 4, 3), np.uint8), ValueError, "uint8 of shape"),
    ],
)
def test_no_images(explainer, given, error, message):
    with pytest.raises(error, match=message):
        explainer(given)


def test_options(explainer, photo):
    with pytest.raises(ValueError, match="text_pair has no meaning for 'vit'"):
        explainer(photo, "a text")
    with pytest.raises(ValueError, match="method must be one of"):
        explainer(photo, method="N-Nope")
    several = explainer(photo, position=[0, 5])
    assert several.patches().shape == (2, 4, 4)
    assert several.heat_map(1).shape == (16, 16)
    whole = explainer(photo, position="all")
    assert whole.scores.shape == (17, 17)
    read = json.loads(several.to_json())
    assert read["grid"] == [4, 4]
    assert read["position"] == [0, 5]


@pytest.mark.parametrize("options", [{}, {"position": [0, 5]}, {"position": "mean"}, {"position": "all"}], ids=str)
def test_renderings(explainer, photo, options, tmp_path):
    a = explainer(photo, **options)
    a.plot(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 300
    html = a.save_html(tmp_path / "a.html").read_text()
    assert "data:image/png;base64," in html
    assert "4 x 4 patches" in html
    assert "base64" in a._repr_html_()


def test_command_line(folder, photo, tmp_path):
    runner = CliRunner()
    done = runner.invoke(
        app, ["attribute", "--image", str(photo), "-m", str(folder), "--plot", str(tmp_path / "p.png")]
    )
    assert done.exit_code == 0, done.output
    assert "highest patches, to [CLS]" in done.output
    assert (tmp_path / "p.png").stat().st_size > 5000
    done = runner.invoke(app, ["attribute", "--image", str(photo), "-m", str(folder), "--json"])
    assert json.loads(done.stdout)["grid"] == [4, 4]
    done = runner.invoke(app, ["attribute", "a text", "-m", str(folder)])
    assert done.exit_code == 2
    assert "this model reads images: give --image FILE" in done.output
    done = runner.invoke(app, ["attribute", "--image", str(photo)])
    assert done.exit_code == 2
    assert "this model reads texts: give TEXT" in done.output
    done = runner.invoke(app, ["attribute", "a text", "--image", str(photo), "-m", str(folder)])
    assert done.exit_code == 2


def test_extract_reads_texts(folder, tmp_path):
    with pytest.raises(ValueError, match="model must read texts for extract"):
        globenc.extract([{"text": "a"}], tmp_path / "out", model=str(folder))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vision_tower_of_a_whole_checkpoint(kind, tmp_path, photo):
    """A checkpoint of CLIP or SigLIP, as the hub has them, gives its vision tower."""
    text = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    make, config = {
        "clip": (transformers.CLIPModel, transformers.CLIPConfig),
        "siglip": (transformers.SiglipModel, transformers.SiglipConfig),
    }[kind]
    model = make(config(text_config=text, vision_config=SIZES))
    randomize(model)
    model.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    transformers.SiglipImageProcessor(size=size).save_pretrained(tmp_path)
    explainer = globenc.GlobEnc.from_pretrained(tmp_path)
    a = explainer(photo, position="mean")
    pixels = explainer.tokenizer(Image.open(photo), return_tensors="pt")["pixel_values"]
    expected = globenc.attribute(model.eval().vision_model, position="mean", pixel_values=pixels)
    np.testing.assert_allclose(a.scores, expected.scores[0].numpy(), rtol=1e-4)


def test_patches_that_do_not_fill_the_image():
    """DINOv2 takes 14 x 15 pixels in patches of 4: two rows and three columns of pixels are in none."""
    model = tiny_vision("dinov2", torch.float32)
    processor = transformers.ViTImageProcessor(do_resize=False)
    a = globenc.GlobEnc(model, processor)(np.zeros((14, 15, 3), np.uint8))
    assert a.grid == (3, 3)
    assert (a.heat_map()[12:] == 0).all()
    assert a.heat_map().sum() == pytest.approx(16 * a.patches().sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_labels": 1}, r"value -?[\d.]+$"),
        (
            {"problem_type": "multi_label_classification", "id2label": {0: "cat", 1: "dog"}},
            r"(cat|dog|no label above) ",
        ),
    ],
    ids=["number", "labels"],
)
def test_answers_of_other_kinds(config, said, photo):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **config))
    randomize(model)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    a = globenc.GlobEnc(model.eval(), processor)(photo)
    with torch.no_grad():
        logits = model(pixel_values=processor(Image.open(photo), return_tensors="pt")["pixel_values"]).logits[0]
    if "num_labels" in config:
        assert (a.value, a.label, a.labels) == (pytest.approx(float(logits[0]), rel=1e-4), None, None)
    else:
        expected = {config["id2label"][k]: float(share) for k, share in enumerate(logits.sigmoid()) if share > 0.5}
        assert dict(a.labels) == pytest.approx(expected, rel=1e-4)
    assert json.loads(a.to_json())["value"] == a.value
    assert re.match(said, image.title(a))
    console = Console(file=io.StringIO(), width=100)
    image.show(a, console, 3)
    assert re.match(said, console.file.getvalue().splitlines()[0])
    assert re.search(f"<h1>{said.removesuffix('$')}", image.page(a))
    assert "prefers-color-scheme: dark" in image.page(a)


def test_a_distilled_deit_has_an_answer(photo):
    """Its class is called DeiTForImageClassificationWithTeacher."""
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SIZES))
    randomize(model)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    assert globenc.GlobEnc(model.eval(), processor)(photo).label in ("LABEL_0", "LABEL_1")


def test_patches_set_the_scale(explainer, photo):
    """[CLS], and what a patch keeps for itself, may have nearly everything."""
    a = explainer(photo, label=None)
    scores = np.full(17, 0.0001, np.float32)
    scores[0], scores[7] = 1 - 0.0001 * 16, 0.0002
    assert _scale(replace(a, scores=scores)) == (pytest.approx(0.0002), "share of a patch")
    scores = np.full(17, 0.0001, np.float32)
    scores[3], scores[7] = 1 - 0.0001 * 16, 0.0002
    assert _scale(replace(a, scores=scores, position=3)) == (pytest.approx(0.0002), "share of a patch (up to 0.998)")
    assert _scale(replace(a, scores=np.zeros(17, np.float32)))[0] == 1


def _scale(a: globenc.ImageAttribution) -> tuple[float, str]:
    axes = image.figure(a).axes
    return float(axes[1].images[1].get_clim()[1]), axes[2].get_ylabel()


def signed(explainer, photo):
    """With class scores of 0 for [CLS], 2 for the first patch, -1 for the last, 0.001 for the others."""
    scores = np.array([0.0, 2.0, *[0.001] * 14, -1.0])
    fields = {"class_scores": scores, "explained_label": "dog", "logit": float(scores.sum()) + 0.5, "remainder": 0.5}
    return replace(explainer(photo), **fields, reference="zero")


def test_class_scores_of_patches_are_a_map_in_two_hues_from_zero(explainer, photo):
    a = signed(explainer, photo)
    drawn = a.plot()
    first, classes, shares = drawn.axes[:3]
    heat = classes.images[1]
    assert heat.get_clim() == (-2.0, 2.0)
    assert heat.get_array()[0, 0] == 2.0
    assert heat.get_array()[15, 15] == -1.0
    blue, orange = heat.get_cmap()(1.0), heat.get_cmap()(0.0)
    assert blue[2] > blue[0] and orange[0] > orange[2]  # noqa: PT018
    assert [(text.get_text(), text.xy) for text in classes.texts] == [
        ("+", (1.5, 1.5)),
        ("\N{MINUS SIGN}", (13.5, 13.5)),
    ]
    assert shares.images[1].get_cmap().name == "inferno"
    assert not first.texts
    assert "patches for 2.01" in drawn._suptitle.get_text()
    own = Figure().subplots()
    assert a.plot(ax=own) is own.get_figure()
    assert own.images[1].get_clim() == (-2.0, 2.0)


def test_what_is_said_of_class_scores_of_patches(explainer, photo, tmp_path):
    a = replace(signed(explainer, photo), explained_label="<b>d\x1bg")
    html = a.save_html(tmp_path / "a.html").read_text(encoding="utf-8")
    for source in (html, a._repr_html_()):
        assert "Which patches speak for &#34;&lt;b&gt;d\ufffdg&#34;" in source
        assert "patches for 2.01" in source
        assert "\x1b" not in source
    console = Console(file=io.StringIO(), width=100)
    image.show(a, console, 3)
    out = console.file.getvalue()
    assert "logit 1.51 = patches for 2.01 - patches against 1.00 + rest 0.50" in out
    assert re.search(r"^ *0 +0 +\+2\.00$", out, re.M)
    assert re.search(r"^ *3 +3 +-1\.00$", out, re.M)
    assert "\x1b" not in out


def test_images_go_in_batches(explainer, photo, monkeypatch):
    """batch_tokens is obeyed, and no score depends on it."""
    array = np.asarray(Image.open(photo))
    images = [array, array[::-1].copy(), array[:, ::-1].copy(), array.transpose(1, 0, 2).copy(), 255 - array]
    sizes = []
    whole = globenc.batch_results.attribute

    def counted(model, **inputs):
        sizes.append(len(inputs["pixel_values"]))
        return whole(model, **inputs)

    monkeypatch.setattr("globenc.batch_results.attribute", counted)
    alone = [explainer(image, per_layer=True) for image in images]
    for batch_tokens, expected in ((17, [1, 1, 1, 1, 1]), (35, [2, 2, 1]), (None, [5]), (1, [1] * 5)):
        sizes.clear()
        found = explainer(images, per_layer=True, batch_tokens=batch_tokens)
        assert sizes == expected
        for ours, single in zip(found, alone, strict=True):
            np.testing.assert_allclose(ours.scores, single.scores, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(ours.layer_scores, single.layer_scores, rtol=1e-4, atol=1e-7)
            np.testing.assert_array_equal(ours.image, single.image)
            assert ours.probability == pytest.approx(single.probability, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 5}, "max_length has no meaning for 'vit', which reads images"),
        ({"text_pair": "a"}, "text_pair has no meaning for 'vit', which reads images"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive whole number, got 0"),
        ({"max_length": "5"}, "max_length must be a positive whole number, got '5'"),
        ({"position": 99}, "position"),
    ],
)
def test_options_of_images(explainer, photo, options, message):
    with pytest.raises(ValueError, match=message):
        explainer(photo, **options)


def test_a_position_outside_names_the_image(explainer, photo):
    with pytest.raises(ValueError, match=r"images\[0\]: position"):
        explainer([photo, photo], position=99)
