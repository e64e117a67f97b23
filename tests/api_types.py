"""What a type checker and an editor know of the interface: `mypy tests/api_types.py` checks it, nothing runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from typing_extensions import assert_type

import globenc


def calls(
    explainer: globenc.GlobEnc, pixels: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], image: PIL.Image.Image
) -> None:
    assert_type(explainer("a text"), globenc.Attribution)
    assert_type(explainer("a text", "its pair", method="W", position=[0, -1]), globenc.Attribution)
    assert_type(explainer(["a text", "another"], per_layer=True), list[globenc.Attribution])
    assert_type(explainer(("a text",), text_pair=("its pair",)), list[globenc.Attribution])
    assert_type(explainer(text for text in ["a text"]), list[globenc.Attribution])
    assert_type(explainer("a text", label="positive", reference="model"), globenc.Attribution)
    assert_type(explainer(["a text", "another"], label=[0, "positive"]), list[globenc.Attribution])
    assert_type(explainer(["a text", "another"], label=None), list[globenc.Attribution])
    assert_type(explainer(image, label=3), globenc.ImageAttribution)
    assert_type(explainer(Path("photo.jpg")), globenc.ImageAttribution)
    assert_type(explainer(image, position="all"), globenc.ImageAttribution)
    assert_type(explainer(pixels), globenc.ImageAttribution)
    assert_type(explainer([Path("photo.jpg"), Path("other.jpg")], batch_tokens=256), list[globenc.ImageAttribution])
    assert_type(explainer([image, image]), list[globenc.ImageAttribution])


def results(result: globenc.Attribution, image: globenc.ImageAttribution) -> None:
    assert_type(len(result), int)
    assert_type([token for token, _ in result], list[str])
    assert_type(result.words(), list[globenc.Word])
    assert_type(result.save_html("a.html"), Path)
    assert_type(image.patches(), np.ndarray)
    assert_type(result.class_scores, np.ndarray | None)
    assert_type((result.explained_label, result.logit), tuple[str | None, float | None])
    assert_type(result.words()[0].class_score, float | None)


def wrong_calls(explainer: globenc.GlobEnc) -> None:
    explainer("a text", positions="all")  # type: ignore[call-overload]
    explainer("a text", text_pair=3)  # type: ignore[call-overload]
