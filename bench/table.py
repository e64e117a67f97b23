"""Put the benchmark table, made from bench/results/cpu.csv, between the README's two bench markers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table() -> str:
    with (ROOT / "bench" / "results" / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
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


def with_table(readme: str) -> str:
    """The README with the present table between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    readme = path.read_text()
    if "--check" not in sys.argv:
        path.write_text(with_table(readme))
    elif with_table(readme) != readme:
        sys.exit("the README's table is not that of bench/results: run bench/table.py")
