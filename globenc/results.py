"""What results of texts and of images have in common: tokens with scores, JSON, HTML, figures, data frames."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TokenScores(ABC):
    """Tokens with their scores, which show and save themselves; the base of `Attribution` and `ImageAttribution`.

    `len(result)` is the number of tokens n, special ones included; iterating gives (token, score) in their order, a
    score being a float, or [positions] where several positions were asked for.
    """

    # as documented where they are: in `Attribution` and `ImageAttribution`
    tokens: list[str]
    scores: np.ndarray
    log2_scale: Any
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    label: str | None
    probability: float | None
    value: float | list[float] | None
    labels: list[tuple[str, float]] | None
    class_scores: np.ndarray | None
    explained_label: str | None
    logit: float | None
    remainder: float | None
    reference: str | None
    method: str
    position: Any
    row_normalize: bool
    model: str

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for k, token in enumerate(self.tokens):
            yield token, float(self.scores[k]) if self.scores.ndim == 1 else self.scores[:, k]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, strings and numbers."""

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as one JSON object."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent, allow_nan=False)

    @abstractmethod
    def _token_columns(self) -> dict[str, Any]:
        """What a data frame says of the tokens besides their scores, by column, n values each."""

    def to_pandas(self) -> pd.DataFrame:
        """A data frame: a row for each token, or for each position and token where several positions were asked for.

        Returns:
            Columns `position` (which of those asked for, from 0), `token`, `score`, where a label is explained
            `class_score`; of a text `word`, `word_id`, `segment`, `start`, `end`, as in `Word`; of an image `row`,
            `column` of the patch. Whole numbers are Int64, <NA> where a token has none, as special tokens.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> import globenc
            >>> a = globenc.GlobEnc.from_pretrained()("a charming journey")
            >>> a.to_pandas().nlargest(1, "score").word.item()
            'charming'
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from error
        rows, n = np.atleast_2d(self.scores), len(self)
        columns = {
            name: values if isinstance(values[0], str) else pd.array(values, dtype="Int64")
            for name, values in self._token_columns().items()
        }
        explained = {} if self.class_scores is None else {"class_score": self.class_scores}
        tokens = pd.DataFrame({"token": self.tokens, "score": np.zeros(n), **explained, **columns})
        frame = pd.concat([tokens] * len(rows), ignore_index=True).assign(score=rows.ravel())
        frame.insert(0, "position", np.repeat(np.arange(len(rows)), n))
        return frame

    @abstractmethod
    def _repr_html_(self) -> str: ...

    @abstractmethod
    def _page(self) -> str:
        """One HTML file as a string."""

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page, light or dark as the reader's system is.

        Of a text: the text coloured by score, the words ranked, the layers where asked for. Of an image: the image, and
        the heat map over it.

        Returns:
            The path written.
        """
        path = Path(path)
        path.write_text(self._page(), encoding="utf-8")
        return path

    @abstractmethod
    def _figure(self, ax: Any) -> Figure: ...

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Figure:
        """A matplotlib figure, which a notebook shows.

        Of a text: bars of the tokens' class scores, where a label is explained, up for and down against; bars of their
        scores; and the layers-by-tokens heat map of the paper's figures where `per_layer=True`. Of an image: the image,
        and over it the class scores and the heat map of the scores, one for each position.

        Args:
            path: where to save it (.png, .pdf, .svg); None only returns the figure. Fonts are embedded as TrueType in a
                PDF, and letters stay text in an SVG.
            ax: axes of a figure of your own to draw into: the class scores where a label is explained, else the scores.

        Returns:
            The matplotlib figure; with `ax` the one that it is part of.

        Raises:
            TypeError: `ax` is no matplotlib Axes.
            ValueError: the file's ending is not one that matplotlib writes.
        """
        from .render.saving import save

        drawn = self._figure(ax)
        if path is not None:
            save(drawn, path)
        return drawn

    def _prediction_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that says what the model predicts."""
        labels = self.labels
        return {
            "label": self.label,
            "probability": self.probability,
            "value": self.value,
            "labels": None if labels is None else [{"label": name, "probability": share} for name, share in labels],
        }

    def _class_score_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that says what speaks for a label and against it."""
        return {
            "class_scores": None if self.class_scores is None else self.class_scores.tolist(),
            "explained_label": self.explained_label,
            "logit": self.logit,
            "remainder": self.remainder,
            "reference": self.reference,
        }

    def _rollout_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that says how the scores came about."""
        position = self.position
        if isinstance(position, torch.Tensor):
            position = position.detach().double().cpu()
        return {
            "log2_scale": np.asarray(self.log2_scale).tolist(),
            "layer_scores": None if self.layer_scores is None else self.layer_scores.tolist(),
            "layer_log2_scale": None if self.layer_log2_scale is None else self.layer_log2_scale.tolist(),
            "method": self.method,
            "position": position if isinstance(position, str) else np.asarray(position).tolist(),
            "row_normalize": self.row_normalize,
            "model": self.model,
        }
