"""The result type for images: which patches a prediction came from; and what can be given as an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .predictions import in_code
from .results import TokenScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False, eq=False)
class ImageAttribution(TokenScores):
    """Which patches of an image a prediction came from.

    Attributes:
        image: what the model saw, resized and cropped by its processor, [height, width, 3] uint8.
        tokens: names of the n tokens: special ones such as "[CLS]", then patches as "row,column" from 0.
        grid: rows and columns of patches; they are the last rows * columns tokens.
        patch: height and width of a patch in pixels of `image`.
        scores: [n], or [positions, n] where several were asked for; each row sums to 1, special tokens included.
        log2_scale, layer_scores, layer_log2_scale, method, position, row_normalize, model: as in `globenc.Attribution`.
        label, probability: the class that the model predicts, of a multi-label model its highest label; None for a
            model that does not classify images.
        value, labels, class_scores, explained_label, logit, remainder, reference: as in `globenc.Attribution`.
    """

    image: np.ndarray
    tokens: list[str]
    grid: tuple[int, int]
    patch: tuple[int, int]
    scores: np.ndarray
    log2_scale: Any
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    label: str | None
    probability: float | None
    method: str
    position: Any
    row_normalize: bool
    model: str
    value: float | list[float] | None = None
    labels: list[tuple[str, float]] | None = None
    class_scores: np.ndarray | None = None
    explained_label: str | None = None
    logit: float | None = None
    remainder: float | None = None
    reference: str | None = None

    def __repr__(self) -> str:
        prediction = in_code(self)
        return f"ImageAttribution({self.grid[0]} x {self.grid[1]} patches{prediction})"

    def patches(self) -> np.ndarray:
        """The patches' scores, [rows, columns], or [positions, rows, columns]; without the special tokens' share."""
        rows, columns = self.grid
        return self.scores[..., len(self.tokens) - rows * columns :].reshape(*self.scores.shape[:-1], rows, columns)

    def heat_map(self, row: int = 0) -> np.ndarray:
        """The score of the patch at each pixel of `image`, [height, width]; `row`: of several positions, which.

        Pixels that belong to no patch (DINOv2 takes any size) are 0.
        """
        patches = self.patches() if self.scores.ndim == 1 else self.patches()[row]
        whole = np.zeros(self.image.shape[:2], patches.dtype)
        spread = patches.repeat(self.patch[0], 0).repeat(self.patch[1], 1)
        whole[: spread.shape[0], : spread.shape[1]] = spread
        return whole

    def special_share(self, row: int = 0) -> float:
        """What went to special tokens; the patches have the rest of 1."""
        scores = self.scores if self.scores.ndim == 1 else self.scores[row]
        return float(scores[: len(self.tokens) - self.grid[0] * self.grid[1]].sum())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image as plain lists, strings and numbers."""
        return {
            "height": self.image.shape[0],
            "width": self.image.shape[1],
            "grid": list(self.grid),
            "patch": list(self.patch),
            **self._prediction_dict(),
            "tokens": self.tokens,
            "scores": self.scores.tolist(),
            **self._class_score_dict(),
            **self._rollout_dict(),
        }

    def _token_columns(self) -> dict[str, Any]:
        rows, columns = self.grid
        special: list[int | None] = [None] * (len(self) - rows * columns)
        return {
            "row": [*special, *(row for row in range(rows) for _ in range(columns))],
            "column": [*special, *(column for _ in range(rows) for column in range(columns))],
        }

    def _repr_html_(self) -> str:
        from .render.image import fragment

        return fragment(self)

    def _page(self) -> str:
        from .render.image import page

        return page(self)

    def _figure(self, ax: Any = None) -> Figure:
        from .render.image import figure

        return figure(self, ax)


def open_image(given: Any, name: str) -> Any:
    """An image as PIL.Image in RGB.

    Args:
        given: a path, a PIL image, or an array [height, width, 3] or [height, width] of uint8.
        name: of the argument, for errors.

    Raises:
        TypeError: it is none of these.
        ValueError: an array of another shape or dtype.
        OSError: the file cannot be read as an image.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(given, str | Path):
        try:
            with Image.open(given) as opened:
                return opened.convert("RGB")
        except UnidentifiedImageError:
            raise OSError(f"image {str(given)!r} is in no format that is known here") from None
        except OSError as error:
            raise OSError(f"image {str(given)!r} cannot be read: {error.strerror or error}") from None
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    if isinstance(given, np.ndarray):
        shaped = given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
        if given.dtype != np.uint8 or not shaped or 0 in given.shape:
            raise ValueError(
                f"{name} must be uint8 of shape [height, width, 3], got {given.dtype} {list(given.shape)}; "
                "pixel_values of your own go to globenc.attribute"
            )
        return Image.fromarray(given[..., 0] if given.ndim == 3 and given.shape[2] == 1 else given).convert("RGB")
    raise TypeError(f"{name} must be a path, a PIL image or an array, got {type(given).__name__}")


def denormalized_images(pixels: torch.Tensor, processor: Any) -> np.ndarray:
    """pixel_values [batch, 3, height, width] as images before normalization, [batch, height, width, 3] uint8."""
    values = pixels.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        values = values * std + mean
    if getattr(processor, "do_rescale", True):
        values = values * 255
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
