"""What a run is asked for: the options that its rows depend on, and what only a worker must know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..class_score_batches import PREDICTED, KnownLabel
from ..rollouts import Position
from .rows import Columns


@dataclass(frozen=True)
class RunOptions:
    """The options of `globenc.extract` that its rows depend on, by the names they have there: runs with different ones
    cannot go on in one another's folders."""

    method: str
    position: Position
    per_layer: bool
    row_normalize: bool
    max_length: int | None
    text_column: str
    pair_column: str | None
    id_column: str | None
    label_column: str | None
    limit: int | None
    words: bool
    keep_text: bool
    shard_rows: int
    class_scores: bool = False
    label: KnownLabel = PREDICTED
    reference: str = "zero"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells one run's rows from another's."""
        told = asdict(self)
        if not self.class_scores:  # folders of versions without class scores do not name them
            for name in ("class_scores", "label", "reference"):
                del told[name]
        return told

    @property
    def columns(self) -> Columns:
        """Which columns of the inputs are read."""
        return Columns(self.text_column, self.pair_column, self.id_column, self.label_column)

    @property
    def model_options(self) -> dict[str, Any]:
        """Options of `GlobEnc.score`."""
        return {
            "method": self.method,
            "position": self.position,
            "per_layer": self.per_layer,
            "row_normalize": self.row_normalize,
            "label": self.label if self.class_scores else None,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        options: what is asked for.
        batch_tokens: budget of a batch; None goes by the free memory.
        strict: raise at the first bad row.
        provenance: the model and all options, as JSON; goes into every file.
    """

    options: RunOptions
    batch_tokens: int | None
    strict: bool
    provenance: str
