"""Put the tables of bench/results, of the families and of the paper between their markers in README and docs."""

from __future__ import annotations

import csv
import json
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
        f"One text, {row['dtype']}, method N-Enc, position `cls`, forward pass included; {row['device']}, "
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


def evaluate_table() -> str:
    """Correlation up to every layer and of every layer, and the other measures, of bench/results/evaluate.json."""
    found = json.loads((ROOT / "bench" / "results" / "evaluate.json").read_text())
    depth, texts, where = found["model_layers"], found["texts"], found["circumstances"]
    numbers = " | ".join(str(layer) for layer in range(1, depth + 1))
    lines = [
        f"`{found['model_name']}` ({found['model_class']}, {depth} layers, accuracy {texts['accuracy']:.1%}) on "
        f"{texts['read']} validation sentences of SST-2: {found['seconds']['attribution and correlation']:.0f} s for "
        f"the two correlation tables, saliency included; {found['seconds']['in all']:.0f} s in all. {where['device']}, "
        f"torch {where['torch']}, transformers {where['transformers']}, commit {where['commit']}, {where['date']}.",
    ]
    for kind, title in (("rollout", "Rollout up to layer"), ("layer", "Layer alone")):
        lines += ["", f"| {title} | {numbers} |", f"|---|{'---:|' * depth}"]
        means = {name: [n["mean"] for n in layers] for name, layers in found["correlation"][kind].items()}
        for name, layers in found["correlation"][kind].items():
            cells = []
            for layer, n in enumerate(layers):
                cell = f"{n['mean']:.2f} ± {n['std']:.2f}"
                cells.append(f"**{cell}**" if n["mean"] == max(m[layer] for m in means.values()) else cell)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Spearman correlation with saliency, mean ± standard deviation; the highest of each layer in bold."]
    columns = [("faithfulness", kind) for kind in ("aopc", "aopc-least", "comprehensiveness", "sufficiency")]
    columns += [("plausibility", kind) for kind in ("auprc", "f1", "iou")]
    lines += [
        "",
        "| whole rollout | AOPC, most first ↑ | AOPC, least first ↓ | comprehensiveness ↑ | sufficiency ↓ | AUPRC ↑ | "
        "token F1 ↑ | IOU ↑ |",
        f"|---|{'---:|' * 7}",
    ]
    for name in found["faithfulness"]["aopc"]:
        cells = []
        for group, kind in columns:
            n = found[group][kind][name]
            cells.append(f"{n['mean']:.3f} ± {n['high99'] - n['mean']:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Faithfulness on {texts['changed_for_faithfulness']} of the sentences, tokens masked; plausibility on "
        f"{texts['with_rationales']} sentences with human rationales. ± is half of the 99 % confidence interval.",
    ]
    return "\n".join(lines)


def class_scores_table() -> str:
    """Signed methods and GlobEnc by removed tokens and people's marks, of bench/results/class_scores.json."""
    measures = {
        "aopc": "AOPC, most first ↑",
        "aopc-least": "AOPC, least first ↓",
        "comprehensiveness": "comprehensiveness ↑",
        "sufficiency": "sufficiency ↓",
        "auprc": "AUPRC ↑",
    }
    lines = []
    for model, row in json.loads((ROOT / "bench" / "results" / "class_scores.json").read_text()).items():
        tables = {**row["faithfulness"], **(row["plausibility"] or {})}
        shown = {kind: title for kind, title in measures.items() if kind in tables}
        aopc, where = tables["aopc"]["methods"], row["circumstances"]
        most = max(numbers["texts"] for numbers in aopc.values())
        lines += [
            f"`{model}` ({row['model_class']}), {most} validation sentences of SST-2, position `{row['position']}`:",
            "",
            f"| method | {' | '.join(shown.values())} | AOPC minus N-Enc | AOPC minus class-scores | forward passes |",
            f"|---|{'---:|' * (len(shown) + 3)}",
        ]
        for name in sorted(aopc, key=lambda name: -aopc[name]["mean"]):
            cells = []
            for kind in shown:
                numbers = tables[kind]["methods"].get(name)
                cell = "" if numbers is None else f"{numbers['mean']:.3f} ± {numbers['half95']:.3f}"
                cells.append(f"**{cell}**" if tables[kind]["best"] == name else cell)
            against, ours = aopc[name]["minus N-Enc"], tables["aopc"]["class-scores minus"].get(name)
            cells.append("" if against is None else f"{against['mean']:+.3f} ± {against['half95']:.3f}")
            cells.append("" if ours is None else f"{-ours['mean']:+.3f} ± {ours['half95']:.3f}")
            cells.append(f"{row['cost'][name]:.1f}" if name in row["cost"] else "")
            fewer = "" if aopc[name]["texts"] == most else f" ({aopc[name]['texts']} sentences)"
            lines.append(f"| {name}{fewer} | {' | '.join(cells)} |")
        marked = ""
        if "auprc" in shown:
            marked = f"; AUPRC on {tables['auprc']['methods']['N-Enc']['texts']} sentences with rationales"
        lines += [
            "",
            f"Tokens masked{marked}. {where['device']}, one thread, torch {where['torch']}, transformers "
            f"{where['transformers']}, {where['dtype']}, commit {where['commit']}, {where['date']}, seed "
            f"{row['seed']}.",
            "",
        ]
    lines.append(
        "± is half of the 95 % confidence interval. Bold: the interval of the difference to every other row, text by "
        "text, excludes zero; rows of fewer sentences are compared on these. Forward passes: measured CPU time over "
        "that of plain forward passes of the same batches, the method's own forward pass included."
    )
    return "\n".join(lines)


def published_table() -> str:
    """The paper's numbers and the notes on them, of globenc/evaluation/published.json."""
    found = json.loads((ROOT / "globenc" / "evaluation" / "published.json").read_text(encoding="utf-8"))

    def cell(mean: float, std: float) -> str:
        return f"{mean:.2f} ± {std:.2f}"

    tables = found["correlation"]
    methods = list(next(iter(tables.values())))
    lines = [f"| preset | {' | '.join(methods)} |", f"|---|{'---:|' * len(methods)}"]
    for preset, numbers in tables.items():
        lines.append(f"| `{preset}` | {' | '.join(cell(**numbers[method]) for method in methods)} |")
    lines += ["", f"{found['quantity']}. {found['source']}.", ""]
    single = found["table2_bert_base_sst2"]
    layers = list(next(iter(single["rollout"].values())))
    heads = ["best layer" if layer == "max" else f"layer {layer}" for layer in layers]
    lines += [f"| `paper-sst2`, Table 2 | {' | '.join(heads)} |", f"|---|{'---:|' * len(layers)}"]
    for kind, title in (("rollout", "rollout up to the layer"), ("individual", "the layer alone")):
        for method, numbers in single[kind].items():
            lines.append(f"| {method}, {title} | {' | '.join(cell(*numbers[layer]) for layer in layers)} |")
    return "\n".join([*lines, "", "What is to be known of them:", "", *(f"- {note}" for note in found["notes"])])


def with_tables(page: str, tables: dict[str, str]) -> str:
    """A page with the present tables between their markers."""
    for name, content in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{content}\n{end}{after}"
    return page


if __name__ == "__main__":
    pages = {
        "README.md": {"bench": table(), "bench-extract": extract_table(), "families": families_table()},
        "docs/evaluation.md": {
            "class-scores": class_scores_table(),
            "evaluate": evaluate_table(),
            "published": published_table(),
        },
    }
    for name, tables in pages.items():
        path = ROOT / name
        page = path.read_text()
        if "--check" not in sys.argv:
            path.write_text(with_tables(page, tables))
        elif with_tables(page, tables) != page:
            sys.exit(f"the tables of {name} are not those of their sources: run bench/table.py")
