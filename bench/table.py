"""Put the tables of bench/results/cpu.csv and extract.csv, and that of the families, between their README markers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def read(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def table() -> str:
    rows = read("cpu")
    cells = {(row["shape"], int(row["n"]), row["what"]): row for row in rows}
    lines = [
        "| model | tokens | forward pass | globenc / forward | direct sum / forward | peak memory: forward, globenc, "
        "direct sum |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for shape, n in dict.fromkeys((shape, n) for shape, n, _ in cells):
        forward, ours, direct = (cells.get((shape, n, what)) for what in ("forward", "globenc", "direct sum"))
        if forward is None or ours is None:
            raise SystemExit(f"bench/results/cpu.csv has no complete rows for {shape}, n={n}: run the benchmarks")
        peaks = ", ".join(f"{float(row['peak_mb']):,.0f}" if row else "-" for row in (forward, ours, direct))
        slow = f"{float(direct['ratio_to_forward']):.0f}x" if direct else "-"
        lines.append(
            f"| {shape} | {n:,} | {float(forward['median_ms']):,.0f} ms | **{ours['ratio_to_forward']}x** | {slow} | "
            f"{peaks} MB |"
        )
    row, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines.append("")
    lines.append(
        f"One text, {row['dtype']}, method N-Enc, target `cls`, forward pass included; {row['device']}, "
        f"torch {row['torch']}, transformers {row['transformers']}, commit {commits}, {row['date']}."
    )
    return "\n".join(lines)


def extract_table() -> str:
    rows = read("extract")
    lines = ["| model | what | rows | measured | against | ratio |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        value, base = (f"{float(row[name]):,g} {row['unit']}" for name in ("value", "base"))
        what = row["what"]
        lines.append(f"| {row['model']} | {what} | {int(row['rows']):,} | {value} | {base} | **{row['ratio']}** |")
    row, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines.append("")
    lines.append(
        f"Descriptions of AG News, {row['dtype']}, default options (memory: 16 tokens a row, shards of 500 rows); the "
        "bare loop calls `globenc.attribute` on the same batches, ready in memory, and keeps nothing. "
        f"{row['device']}, torch {row['torch']}, transformers {row['transformers']}, commit {commits}, {row['date']}."
    )
    return "\n".join(lines)


def families_table() -> str:
    from globenc.encoders import describe, supported_encoders

    lines = [
        "| family (`config.model_type`) | for example | layers | kernels | notes | also tested on |",
        "|---|---|---|---|---|---|",
    ]
    for family in map(describe, supported_encoders()):
        cells = (
            f"`{family['family']}`",
            *(family[name] for name in ("examples", "layers", "kernels", "notes", "tested")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_tables(readme: str) -> str:
    """The README with the present tables between their markers."""
    tables = {"bench": table(), "bench-extract": extract_table(), "families": families_table()}
    for name, content in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{content}\n{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    readme = path.read_text()
    if "--check" not in sys.argv:
        path.write_text(with_tables(readme))
    elif with_tables(readme) != readme:
        sys.exit("the README's tables are not those of bench/results: run bench/table.py")
