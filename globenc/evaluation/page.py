"""An evaluation told: one web page that needs neither the paper nor other files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..printing import printable
from .measurements import COSTLY_METHODS, RANDOM, RANDOM_DRAWS, SALIENCY, Measurements
from .tables import (
    MARKS_COLUMNS,
    REMOVAL_COLUMNS,
    correlation_rows,
    layer_tables,
    mean_and_std,
    measure_rows,
    published_notes,
)

_MEANING = {
    "W": "attention weights, mean over heads",
    "W-FixedRes": "attention weights, half identity for the residual (attention rollout)",
    "W-Res": "attention weights, mixed with the identity as much as the layer really mixes",
    "N": "norms of the value vectors that attention sums up",
    "N-FixedRes": "the same, half identity for the residual",
    "N-Res": "norms with the residual added as it is",
    "N-ResLN": "norms behind the first LayerNorm",
    "N-Enc": "norms behind the whole layer: with rollout, GlobEnc",
    **COSTLY_METHODS,
    SALIENCY: "gradient times input of the answer, no method of attention",
    RANDOM: f"random numbers, mean of {RANDOM_DRAWS} draws",
}
_STYLE = """
:root { color-scheme: light dark; --line: rgba(128,128,128,.35); --muted: rgba(110,118,129,1); }
body { margin: 2rem auto; max-width: 66rem; padding: 0 1.2rem; background: #ffffff; color: #1b1f24;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.3; margin-bottom: .2em; } h2 { font-size: 1.2rem; margin: 2.2em 0 .4em; }
h3 { font-size: 1rem; margin: 1.4em 0 .2em; }
p, ul { max-width: 52rem; } li { margin: .25em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { padding: .22em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 700; } tr.main td:first-child { font-weight: 700; }
small, .muted { color: var(--muted); font-size: .88rem; }
figure { margin: 1em 0; } figure img { max-width: 100%; background: #ffffff; border-radius: .4em; }
figcaption { color: var(--muted); font-size: .88rem; max-width: 52rem; }
.tokens { line-height: 2; white-space: nowrap; } .tokens span { border-radius: .2em; padding: .1em .12em; }
.tokens .special { color: var(--muted); font-size: .8em; }
.tokens b { display: inline-block; width: 7.5em; white-space: nowrap; font-weight: 600; font-size: .88rem; }
details { margin: .8em 0; } summary { cursor: pointer; }
@media (prefers-color-scheme: dark) { body { background: #14171c; color: #e6e8eb; } }
@media (prefers-color-scheme: dark) { :root { --muted: rgba(150,158,168,1); } }
"""


def escape(text: str) -> str:
    """Text of the data's as HTML."""
    return html.escape(printable(text))


def write_report(path: Path, figures: Path, found: Measurements, results: Mapping[str, Any]) -> None:
    """Write the web page; figures are taken into it."""
    sections = [
        _head(results),
        _verdict(results),
        _correlation(found, results, figures),
        _faithfulness(results, figures),
        _plausibility(results),
        _examples(results),
        _circumstances(results),
    ]
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results['title'])} · globenc</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _head(results: Mapping[str, Any]) -> str:
    texts, settings = results["texts"], results["settings"]
    read = f"{texts['read']:,} texts" if texts["read"] else f"{texts['with_rationales']:,} sentences"
    named = {"-": "standard input", "rows": "", "table": ""}  # what has no name of its own is left out
    where = ", ".join(filter(None, (named.get(name, Path(name).name) for name in results["data"])))
    accuracy = (
        "" if texts["accuracy"] is None else f" It gives {texts['accuracy']:.1%} of them the label they came with."
    )
    methods = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align:left'>{escape(_MEANING[name])}</td></tr>"
        for name in [*settings["methods"], SALIENCY, RANDOM]
    )
    return (
        f"<h1>{escape(results['title'])}</h1>"
        f"<p class='muted'>{escape(results['model_name'])} ({escape(results['model_class'])}, "
        f"{results['model_layers']} layers) on {read}{f' of {escape(where)}' if where else ''}.{accuracy}</p>"
        "<p>An attribution method gives every token of a text a share in the model's answer. There is no ground truth "
        "for such shares, so this page holds the methods against three things from outside: what the gradient of the "
        "answer says (correlation), what happens to the answer when tokens are taken away (faithfulness), and which "
        "words people marked as reasons (plausibility). The methods differ in what they count of an encoder layer; "
        "rollout multiplies the layers' maps to follow tokens from the input to the top.</p>"
        f"<details><summary>The methods, in a line each</summary><table>{methods}</table></details>"
    )


def _verdict(results: Mapping[str, Any]) -> str:
    lines = [*_verdict_on_correlation(results), *_verdict_on_removal(results), *_verdict_on_marks(results)]
    return f"<h2>In short</h2><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _verdict_on_correlation(results: Mapping[str, Any]) -> list[str]:
    if "correlation" not in results:
        return []
    correlation = results["correlation"]
    means = {name: layers[-1]["mean"] for name, layers in correlation["rollout"].items()}
    ranked = sorted((name for name in means if means[name] is not None), key=lambda name: -means[name])
    if not ranked:
        return ["No text has a correlation: scores or saliency are constant in all of them."]
    main, minus = results["main_method"], correlation["main_minus"]
    lines = [
        f"<b>Correlation with saliency</b>, whole rollout: {escape(ranked[0])} is highest with {means[ranked[0]]:.2f}"
        + (f", then {escape(ranked[1])} with {means[ranked[1]]:.2f}." if len(ranked) > 1 else ".")
    ]
    if main in ranked and len(ranked) > 1:
        other = ranked[1] if ranked[0] == main else ranked[0]
        lines += _compared(main, other, minus[other])
    return lines


def _compared(main: str, other: str, numbers: Mapping[str, Any]) -> list[str]:
    """How the main method stands to another one on the same texts."""
    if numbers["low99"] is None:
        return []
    verb = "above" if numbers["low99"] > 0 else "below" if numbers["high99"] < 0 else "not told apart from"
    return [
        f"Text by text {escape(main)} is {verb} {escape(other)}: {numbers['mean']:+.3f}, 99 % confidence interval "
        f"{numbers['low99']:+.3f} to {numbers['high99']:+.3f}."
    ]


def _verdict_on_removal(results: Mapping[str, Any]) -> list[str]:
    if "faithfulness" not in results:
        return []
    table = {name: numbers for name, numbers in results["faithfulness"]["aopc"].items() if numbers["mean"] is not None}
    names = [name for name in table if name not in (SALIENCY, RANDOM)]
    if not names:
        return []
    top = max(names, key=lambda name: table[name]["mean"])
    under = [name for name in names if table[name]["mean"] <= table[RANDOM]["mean"]]
    line = (
        f"<b>Faithfulness</b>: taking the tokens that {escape(top)} calls important lowers the answer's probability "
        f"most, by {table[top]['mean']:.3f} on average; {_others(table, top)}."
    )
    if under:
        line += f" No better than random: {escape(', '.join(under))}."
    main = results["main_method"]
    return [line, *(_compared(main, top, table[top]["main_minus_this"]) if top != main else [])]


def _verdict_on_marks(results: Mapping[str, Any]) -> list[str]:
    if "plausibility" not in results:
        return []
    table = {name: n for name, n in results["plausibility"]["auprc"].items() if n["mean"] is not None}
    names = [name for name in table if name not in (SALIENCY, RANDOM)]
    if not names:
        return []
    top = max(names, key=lambda name: table[name]["mean"])
    return [
        f"<b>Plausibility</b>: {escape(top)} finds the words that people marked best, AUPRC {table[top]['mean']:.3f}; "
        f"{_others(table, top)}.",
        *(
            _compared(results["main_method"], top, table[top]["main_minus_this"])
            if top != results["main_method"]
            else []
        ),
    ]


def _others(table: Mapping[str, Any], top: str) -> str:
    """What stands beside the best method in a sentence."""
    names = [name for name in ("N-Enc", SALIENCY, RANDOM) if name in table and name != top]
    return ", ".join(f"{name} {table[name]['mean']:.3f}" for name in names)


def _correlation(found: Measurements, results: Mapping[str, Any], figures: Path) -> str:
    if "correlation" not in results:
        return ""
    settings, correlation = results["settings"], results["correlation"]
    head, rows, best = correlation_rows(results)
    undefined = {name: layers[-1]["undefined"] for name, layers in correlation["rollout"].items()}
    constant = ", ".join(f"{name} {count}" for name, count in undefined.items() if count)
    main, minus = results["main_method"], correlation["main_minus"]
    paired = "".join(
        f"<tr><td>{escape(name)}</td><td>{_signed(n['mean'])}</td><td>{_signed(n['low99'])} to {_signed(n['high99'])}"
        f"</td></tr>"
        for name, n in minus.items()
    )
    special = "special tokens included" if settings["special_tokens"] else "special tokens left out"
    return (
        "<h2>Correlation with saliency</h2>"
        f"<p>Saliency is the length of gradient times input, for the {settings['saliency_output']} of the "
        f"{settings['saliency_of']} class, at the embeddings. For each text the tokens are ranked by the method and by "
        f"saliency ({special}); Spearman's correlation of the two rankings is 1 where they agree, 0 where they have "
        "nothing to do with one another. Mean ± standard deviation over the texts.</p>"
        f"<div class='scroll'>{_table(head, rows, best)}</div>"
        + _published(results)
        + (
            f"<p class='muted'>Texts without a correlation (constant scores): {escape(constant)}.</p>"
            if constant
            else ""
        )
        + _image(
            figures / "correlation_per_layer.svg",
            "Mean correlation layer by layer, with the 99 % confidence interval of the mean as a band. Left: the "
            "layers up to this one, multiplied. Right: this layer's map alone.",
        )
        + _image(
            figures / "correlation_boxes.svg",
            "The whole rollout, text by text: half of the texts lie in the box, the line is the median, the diamond "
            "the mean.",
        )
        + (
            f"<h3>{escape(main)} minus each other method, on the same texts</h3>"
            "<table><tr><th>method</th><th>mean difference</th><th>99 % confidence</th></tr>"
            f"{paired}</table>"
            if paired
            else ""
        )
        + "<details><summary>Every layer as numbers</summary>"
        + "".join(
            f"<h3>{title}</h3><div class='scroll'>{_heat(correlation[kind])}</div>"
            for kind, title in (("rollout", "Rollout up to the layer"), ("layer", "The layer alone"))
        )
        + "</details>"
    )


def _published(results: Mapping[str, Any]) -> str:
    """The published numbers of single layers, and the notes on all that are published."""
    first, *notes = published_notes(results) or [""]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        "".join(
            f"<h3>{escape(title)}</h3><div class='scroll'>{_table(head, rows, set())}</div>"
            for title, head, rows in layer_tables(results)
        )
        + (f"<p class='muted'>{escape(first)}</p>" if first else "")
        + (f"<p class='muted'>To be known of these numbers:</p><ul class='muted'>{listed}</ul>" if notes else "")
    )


def _faithfulness(results: Mapping[str, Any], figures: Path) -> str:
    if "faithfulness" not in results:
        return ""
    tables, count = results["faithfulness"], results["texts"]["changed_for_faithfulness"]
    how = "replaced by the mask token" if results["settings"]["removal"] == "mask" else "deleted"
    return (
        "<h2>Faithfulness</h2>"
        f"<p>In {count:,} texts tokens are {how}, never special ones, and the probability of the answer to the whole "
        "text is read again. AOPC is its mean drop with 10, 20, ... 90 % of the tokens gone, the most or the least "
        "important first; comprehensiveness with the top 1, 5, 10, 20 and 50 % gone; sufficiency with only these "
        "left. An arrow upwards: higher is better. A model has not seen such broken texts in training, so compare "
        "methods with one another and with random, and read nothing into the size alone. ± is half of the 99 % "
        "confidence interval.</p>"
        f"<div class='scroll'>{_table(*measure_rows(tables, REMOVAL_COLUMNS))}</div>"
        + _image(figures / "faithfulness_curves.svg", "Drop of the answer's probability, by how much was removed.")
    )


def _plausibility(results: Mapping[str, Any]) -> str:
    if "plausibility" not in results:
        return ""
    counted = results["plausibility"]["auprc"][SALIENCY]
    return (
        "<h2>Plausibility</h2>"
        f"<p>In {counted['count']:,} of {results['texts']['with_rationales']:,} sentences people marked some, not "
        "all words as reasons (a word counts where half of the people marked it). AUPRC: how well the scores separate "
        "marked tokens from the others. F1 and IOU: agreement of as many highest tokens as are marked with the marked "
        "ones. Plausible is not faithful: a method is not wrong where the model looks at other words than people do. "
        "± is half of the 99 % confidence interval.</p>"
        f"<div class='scroll'>{_table(*measure_rows(results['plausibility'], MARKS_COLUMNS))}</div>"
    )


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: set[tuple[int, int]]) -> str:
    body = ""
    for r, row in enumerate(rows):
        cells = "".join(
            f"<td{' class=best' if (r, c) in best else ''}>{escape(cell)}</td>" for c, cell in enumerate(row)
        )
        body += f"<tr{' class=main' if row[0] == 'N-Enc' else ''}>{cells}</tr>"
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _heat(methods: Mapping[str, Any]) -> str:
    depth = len(next(iter(methods.values())))
    head = "".join(f"<th>{layer}</th>" for layer in range(1, depth + 1))
    body = ""
    for name, layers in methods.items():
        cells = "".join(
            f"<td style='background:rgba({'37,99,235' if (n['mean'] or 0) > 0 else '220,38,38'},"
            f"{0.55 * abs(n['mean'] or 0):.2f})' title='{mean_and_std(n)}, {n['count']} texts'>"
            f"{'none' if n['mean'] is None else format(n['mean'], '.2f')}</td>"
            for n in layers
        )
        body += f"<tr{' class=main' if name == 'N-Enc' else ''}><td>{escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th>layer</th>{head}</tr>{body}</table>"


def _image(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _examples(results: Mapping[str, Any]) -> str:
    if not results["examples"] or "correlation" not in results:
        return ""
    methods, main = results["settings"]["methods"], results["main_method"]
    title = {"most": "Most agreement", "middle": "In the middle", "least": "Least agreement"}
    blocks = []
    for example in results["examples"]:
        lines = "".join(
            f"<div class='tokens'><b>{escape(name)}</b>{_coloured(example, name)}</div>"
            for name in [SALIENCY, main, *(name for name in ("W-FixedRes",) if name in methods and name != main)]
        )
        blocks.append(
            f"<h3>{title[example['agreement']]}: {example['correlation']:.2f}</h3><div class='scroll'>{lines}</div>"
        )
    return (
        f"<h2>What it looks like</h2><p>Three short texts by how far {escape(main)} and saliency agree; full colour is "
        "the highest token that is no special one.</p>" + "".join(blocks)
    )


def _coloured(example: Mapping[str, Any], name: str) -> str:
    scores, special = np.array(example["scores"][name]), np.array(example["special"])
    top = max(float(scores[~special].max(initial=0.0)), 1e-30)
    pieces = []
    for token, score, hidden in zip(example["tokens"], scores, special, strict=True):
        alpha = 0.6 * min(float(score) / top, 1.0)
        kind, hue = (" class='special'", "128,128,128") if hidden else ("", "37,99,235")
        pieces.append(
            f"<span{kind} style='background:rgba({hue},{alpha:.3f})' title='{score:.4f}'>{escape(token)}</span>"
        )
    return " ".join(pieces)


def _circumstances(results: Mapping[str, Any]) -> str:
    texts, settings, versions = results["texts"], results["settings"], results["versions"]
    facts = [
        f"position {settings['position']}, seed {settings['seed']}, {settings['device']}, {settings['dtype']}",
        ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in results["seconds"].items()),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if texts["rejected"]:
        facts.append(f"{texts['rejected']:,} rows were left out; the first: {texts['first_rejects'][0]}")
    if texts["truncated"]:
        facts.append(f"{texts['truncated']:,} texts were longer than the model takes, and cut")
    if texts["rationales_left_out"]:
        facts.append(f"{texts['rationales_left_out']:,} rows of the rationales have no marks that can be used")
    listed = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<h2>Circumstances</h2><ul class='muted'>{listed}</ul><p class='muted'>Methods and equations (13)-(18): "
        "Modarressi et al., NAACL 2022. Comprehensiveness, sufficiency, plausibility: DeYoung et al., ACL 2020. "
        "results.csv beside this page has the numbers, examples.parquet every text's own.</p>"
    )
