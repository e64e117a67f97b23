"""The files with an evaluation's numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..printing import escaped
from .measurements import MARK_MEASURES, Measurements
from .tables import as_rows


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    written = escaped(json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False))
    path.write_text(written + "\n", encoding="utf-8")


def write_csv(path: Path, results: Mapping[str, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = as_rows(results)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_examples(path: Path, measurements: Measurements) -> None:
    """Every single value: id, metric, setting, method, layer, value; null where it is not defined."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "metric", "setting", "method")]
        + [("layer", pa.int32()), ("value", pa.float64())]
    )
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:

        def add(ids: Sequence[Any], metric: str, setting: str, method: str, layer: int | None, values: Any) -> None:
            columns = {
                "id": [str(i) for i in ids],
                "metric": [metric] * len(ids),
                "setting": [setting] * len(ids),
                "method": [method] * len(ids),
                "layer": [layer] * len(ids),
                "value": pa.array(values, pa.float64(), from_pandas=True),  # NaN is null
            }
            writer.write_table(pa.table(columns, schema))

        for kind, table in measurements.correlations.items():
            for m, method in enumerate(measurements.rolled_out):
                for layer in range(measurements.layers):
                    add(measurements.ids, "correlation", kind, method, layer + 1, table[:, m, layer])
        for method, row in measurements.signed_correlations.items():
            add(measurements.ids, "correlation", "signed", method, None, row)
        for method, measures in measurements.drops.items():
            for kind, drops in measures.items():
                add([measurements.ids[k] for k in measurements.removed], kind, "", method, None, drops.mean(0))
        for method, values in measurements.plausible.items():
            for column, kind in enumerate(MARK_MEASURES):
                add(range(len(values)), kind, "", method, None, values[:, column])
