"""Train the small sentiment classifier that ships with globenc.

A BERT encoder (6 layers, hidden 192, 6 heads) is cut out of a larger one that was fine-tuned on SST-2
and then distilled from it, on a CPU:

1. the teacher's word-piece vocabulary is pruned to what movie reviews and everyday English need;
2. the student starts as a projection of the teacher: a shared 384 -> 192 basis for the hidden states,
   half of the heads and of the feed-forward units, every weight refitted in closed form, layer by layer;
3. the teacher labels the training phrases and augmented sentences (constituents swapped, words replaced
   or masked, phrases joined), and the student learns its logits and its hidden states.

The validation sentences are read once, at the end, for the report; a held-out part of the training
phrases selects the checkpoint.

    python examples/train_default_model.py --teacher minilm-sst2 --train train.jsonl.gz \
        --validation validation.jsonl --output globenc/default_model --minutes 30
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gzip
import json
import math
import platform
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HIDDEN, HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 192, 6, 32, 768, 6
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = {0: "negative", 1: "positive"}


@dataclass
class Example:
    text: str
    label: int  # 0, 1, or -1 for augmented text without a human label


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def keep_freed_memory() -> None:
    """Stop glibc from returning every freed activation to the kernel (60 % more tokens per second here)."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 256 << 20)):
            libc.mallopt(parameter, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


# --------------------------------------------------------------------------------------------- data


def read_examples(path: Path) -> list[Example]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Example(row["sentence"].strip(), int(row["label"])) for row in rows]


def find_sentences(examples: list[Example], min_words: int = 8) -> list[Example]:
    """The phrases of at least `min_words` words that are not part of a longer phrase: the whole sentences."""
    texts = {example.text for example in examples}
    inner: set[str] = set()
    for text in sorted(texts, key=len, reverse=True):
        if text in inner:
            continue
        words = text.split()
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        inner.update(span for span in spans if span != text and span in texts)
    return [e for e in examples if e.text not in inner and len(e.text.split()) >= min_words]


def split_heldout(
    examples: list[Example], sentences: list[Example], count: int, rng: random.Random, min_words: int = 8
) -> tuple[list[Example], list[Example]]:
    """Hold out whole sentences until they and their parts of `min_words` words or more are `count` phrases.

    Every phrase inside a held-out sentence leaves the training set.
    """
    by_text = {example.text: example for example in examples}
    removed: set[str] = set()
    heldout: dict[str, Example] = {}
    for sentence in rng.sample(sentences, len(sentences)):
        if len(heldout) >= count:
            break
        words = sentence.text.split()
        for i in range(len(words)):
            for j in range(i + 1, len(words) + 1):
                span = " ".join(words[i:j])
                if span in by_text:
                    removed.add(span)
                    if j - i >= min_words:
                        heldout[span] = by_text[span]
    return [e for e in examples if e.text not in removed], list(heldout.values())


class Augmenter:
    """Writes new sentences from training phrases; the teacher labels them."""

    def __init__(self, examples: list[Example], neighbours: dict[str, list[str]], rng: random.Random) -> None:
        self.rng = rng
        self.neighbours = neighbours
        self.phrases = {e.text for e in examples}
        self.by_start: dict[tuple[str, int], list[str]] = defaultdict(list)
        self.by_size: dict[int, list[str]] = defaultdict(list)
        for text in sorted(self.phrases):
            words = text.split()
            self.by_size[len(words)].append(text)
            self.by_start[words[0], (len(words) + 1) // 2].append(text)
        self.bases = sorted(text for text in self.phrases if 6 <= len(text.split()) <= 40)
        self.weights = np.cumsum([len(text.split()) for text in self.bases]).tolist()
        self.short = sorted(text for text in self.phrases if 2 <= len(text.split()) <= 14)

    def swap_constituent(self, words: list[str]) -> list[str]:
        """Replace a phrase inside the sentence by another one of like size, often one that starts alike."""
        spans = [
            (i, j)
            for i in range(len(words))
            for j in range(i + 1, min(i + 10, len(words)) + 1)
            if j - i < len(words) and " ".join(words[i:j]) in self.phrases
        ]
        if not spans:
            return words
        i, j = self.rng.choice(spans)
        alike = self.by_start[words[i], (j - i + 1) // 2]
        pool = alike if len(alike) > 3 and self.rng.random() < 0.7 else self.by_size[j - i]
        return words[:i] + self.rng.choice(pool).split() + words[j:]

    def replace_words(self, words: list[str]) -> list[str]:
        result = []
        for word in words:
            draw = self.rng.random()
            if draw < 0.12 and word in self.neighbours:
                word = self.rng.choice(self.neighbours[word])
            elif draw > 0.97:
                word = "[MASK]"
            elif draw > 0.95:
                continue
            result.append(word)
        return result or words

    def join(self, words: list[str]) -> list[str]:
        other = self.rng.choice(self.short).split()
        link = self.rng.choice([",", "and", "but", "--", ".", ";", "although", "because"])
        return [*words, link, *other] if self.rng.random() < 0.5 else [*other, link, *words]

    def cut(self, words: list[str]) -> list[str]:
        size = self.rng.randint(max(4, len(words) // 2), len(words))
        start = self.rng.randint(0, len(words) - size)
        return words[start : start + size]

    def sample(self) -> Example:
        rng = self.rng
        if rng.random() < 0.15:
            words = self.join(rng.choice(self.short).split())
        else:
            words = rng.choices(self.bases, cum_weights=self.weights)[0].split()
        if len(words) > 12 and rng.random() < 0.15:
            words = self.cut(words)
        for _ in range(rng.choice((0, 1, 1, 2))):
            words = self.swap_constituent(words)
        if rng.random() < 0.6:
            words = self.replace_words(words)
        if len(words) < 16 and rng.random() < 0.3:
            words = self.join(words)
        return Example(" ".join(words[:56]), -1)


def nearest_words(
    teacher: BertForSequenceClassification, vocab: dict[str, int], count: int = 8
) -> dict[str, list[str]]:
    """The whole words whose teacher embeddings are nearest, for words of three letters or more."""
    words = [piece for piece in vocab if piece.isascii() and piece.isalpha() and len(piece) > 2]
    rows = F.normalize(teacher.bert.embeddings.word_embeddings.weight[[vocab[w] for w in words]], dim=-1)
    result = {}
    for start in range(0, len(words), 2048):
        nearest = (rows[start : start + 2048] @ rows.T).topk(count + 1).indices[:, 1:].tolist()
        for word, indices in zip(words[start : start + 2048], nearest, strict=True):
            result[word] = [words[index] for index in indices]
    return result


# ---------------------------------------------------------------------------------------- tokenizer


def is_basic_character(character: str) -> bool:
    """ASCII, Latin letters, and the typographic marks of ordinary English text."""
    return (
        32 < ord(character) < 0x180
        or character in "\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u2022\u20ac\u2122\u2032\u2033"
    )


def choose_pieces(vocab: dict[str, int], counts: Counter[str], size: int, general: float = 0.3) -> list[str]:
    """Pieces for the student, in the teacher's order.

    Besides the specials and all basic characters, those with the largest frequency in the training
    sentences plus `general` times a Zipf prior over the teacher's vocabulary, which is ordered by its
    frequency in general English.
    """
    bare = {piece: piece.removeprefix("##") for piece in vocab}
    chosen = {piece for piece, text in bare.items() if len(text) == 1 and is_basic_character(text)}
    bracketed = {piece for piece in vocab if piece[0] == "[" and piece[-1] == "]"}
    ordinary = sorted(set(vocab) - chosen - bracketed, key=vocab.__getitem__)
    total = sum(counts.values())
    harmonic = sum(1 / rank for rank in range(1, len(ordinary) + 1))
    score = {p: counts[p] / total + general / harmonic / rank for rank, p in enumerate(ordinary, start=1)}
    ordinary.sort(key=score.__getitem__, reverse=True)
    chosen.update(ordinary[: size - len(chosen) - len(SPECIALS)])
    return SPECIALS + sorted(chosen, key=vocab.__getitem__)


def write_tokenizer(teacher_dir: Path, pieces: list[str], output: Path) -> None:
    ids = {piece: index for index, piece in enumerate(pieces)}
    spec = json.loads((teacher_dir / "tokenizer.json").read_text(encoding="utf-8"))
    spec["truncation"] = spec["padding"] = None
    spec["model"]["vocab"] = ids
    for token in spec["added_tokens"]:
        token["id"] = ids[token["content"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    for name, token in spec["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    (output / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 512,
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "padding_side": "right",
        "truncation_side": "right",
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIALS},
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- batches and evaluation


def padded_width(length: int) -> int:
    return 2 * math.ceil(length / 2) if length <= 24 else 4 * math.ceil(length / 4)


def batches_by_length(lengths: np.ndarray, tokens: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Index batches of like length with at most `tokens` padded tokens, shuffled if there is an `rng`.

    All full batches of one padded width have the same shape: every new shape costs the CPU's matrix
    library time.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in order.tolist():
        groups[padded_width(lengths[index])].append(index)
    batches: list[np.ndarray] = []
    rest: list[int] = []
    for width in sorted(groups):
        members, size = rest + groups[width], max(1, tokens // width)
        full = len(members) // size * size
        batches += [np.array(members[i : i + size]) for i in range(0, full, size)]
        rest = members[full:]  # goes with the next width
    if rest:
        batches.append(np.array(rest))
    if rng is not None:
        rng.shuffle(batches)
    return batches


def pad(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids [batch, n], padded with 0, and attention mask [batch, n]."""
    width = padded_width(max(len(row) for row in rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in encoded]


@torch.no_grad()
def predict(model: BertForSequenceClassification, rows: list[np.ndarray], tokens: int = 2048) -> Tensor:
    """Logits [len(rows), 2]."""
    training = model.training
    model.eval()
    logits = torch.empty(len(rows), 2)
    for batch in batches_by_length(np.array([len(row) for row in rows]), tokens, None):
        ids, mask = pad([rows[i] for i in batch])
        logits[torch.from_numpy(batch)] = model(ids, attention_mask=mask).logits
    model.train(training)
    return logits


def accuracy(logits: Tensor, examples: list[Example]) -> float:
    return (logits.argmax(-1) == torch.tensor([e.label for e in examples])).double().mean().item()


def agreement(logits: Tensor, other: Tensor) -> float:
    return (logits.argmax(-1) == other.argmax(-1)).double().mean().item()


# ------------------------------------------------------------------- student cut out of the teacher


class LeastSquares:
    """Ridge regression y = W x + b from batches, in float64."""

    def __init__(self) -> None:
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        self.xx = self.xx + (x.T @ x).double()
        self.xy = self.xy + (x.T @ y.reshape(-1, y.shape[-1])).double()

    def solve(self, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
        xx = self.xx + ridge * self.xx.diagonal().mean() * torch.eye(len(self.xx), dtype=torch.float64)
        solution = torch.linalg.solve(xx, self.xy).float()
        return solution[:-1].T.contiguous(), solution[-1].contiguous()


def fit_linear(linear: nn.Linear, inputs: list[Tensor], targets: list[Tensor]) -> None:
    """Set the layer to the least-squares map from inputs to targets (lists of batches)."""
    problem = LeastSquares()
    for x, y in zip(inputs, targets, strict=True):
        problem.add(x, y)
    weight, bias = problem.solve()
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def fit_norm(norm: nn.LayerNorm, inputs: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """Fit weight and bias, each dimension by itself, to the targets; return norm(inputs)."""
    standard = [F.layer_norm(batch, (HIDDEN,), eps=norm.eps) for batch in inputs]
    x = torch.cat([batch.reshape(-1, HIDDEN) for batch in standard])
    y = torch.cat([batch.reshape(-1, HIDDEN) for batch in targets])
    centred = x - x.mean(0)
    slope = (centred * (y - y.mean(0))).mean(0) / centred.square().mean(0)
    norm.weight.copy_(slope.clamp(min=0.05))
    norm.bias.copy_(y.mean(0) - norm.weight * x.mean(0))
    return [norm(batch) for batch in inputs]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Self-attention context [batch, n, heads * HEAD_DIM] without padding."""
    split = [x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)


def choose_heads(contexts: list[Tensor], outputs: list[Tensor], heads: int, keep: int) -> list[int]:
    """Drop the heads without which a linear map of the others still gives the attention output best."""
    problem = LeastSquares()
    for context, output in zip(contexts, outputs, strict=True):
        problem.add(context, output)

    def explained(kept: list[int]) -> float:
        index = torch.tensor([h * HEAD_DIM + i for h in kept for i in range(HEAD_DIM)] + [heads * HEAD_DIM])
        part, xy = problem.xx[index][:, index], problem.xy[index]
        part = part + 1e-4 * part.diagonal().mean() * torch.eye(len(part), dtype=torch.float64)
        return (xy * torch.linalg.solve(part, xy)).sum().item()

    kept = list(range(heads))
    while len(kept) > keep:
        kept.remove(max(kept, key=lambda head: explained([h for h in kept if h != head])))
    return kept


@torch.no_grad()
def cut_student(
    teacher: BertForSequenceClassification, config: BertConfig, piece_ids: Tensor, rows: list[np.ndarray]
) -> tuple[BertForSequenceClassification, Tensor]:
    """The student as a projection of the teacher, and the basis [teacher hidden, HIDDEN] of its states.

    `rows` are calibration sentences in student ids. Quantities of the teacher carry the prefix t_. Each
    student weight is fitted to the student's own inputs, so that later layers mend earlier errors.
    """
    student = BertForSequenceClassification(config).eval()
    groups: dict[int, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        groups[len(row)].append(row)
    batches = [torch.from_numpy(np.stack(group)).long() for group in groups.values()]  # no padding

    t_states = [teacher.bert(piece_ids[ids], output_hidden_states=True).hidden_states for ids in batches]
    moment: Tensor | float = 0.0
    for layer in range(LAYERS + 1):
        flat = torch.cat([states[layer].flatten(0, 1) for states in t_states])
        layer_moment = (flat.T @ flat).double()
        moment = moment + layer_moment / layer_moment.trace()
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, -HIDDEN:].flip(1).float().contiguous()
    log(f"basis keeps {values[-HIDDEN:].sum() / values.sum():.4f} of the hidden states' second moment")

    t_embed, s_embed = teacher.bert.embeddings, student.bert.embeddings
    s_embed.word_embeddings.weight.copy_(t_embed.word_embeddings.weight[piece_ids] @ basis)
    s_embed.position_embeddings.weight.copy_(t_embed.position_embeddings.weight @ basis)
    s_embed.token_type_embeddings.weight.copy_(t_embed.token_type_embeddings.weight @ basis)
    summed = [
        s_embed.word_embeddings(ids)
        + s_embed.position_embeddings.weight[: ids.shape[1]]
        + s_embed.token_type_embeddings.weight[0]
        for ids in batches
    ]
    hidden = fit_norm(s_embed.LayerNorm, summed, [states[0] @ basis for states in t_states])

    t_heads = teacher.config.num_attention_heads
    layers = zip(teacher.bert.encoder.layer, student.bert.encoder.layer, strict=True)
    for number, (t_layer, s_layer) in enumerate(layers):
        t_in = [states[number] for states in t_states]
        t_attention, s_attention = t_layer.attention, s_layer.attention
        t_linears = (t_attention.self.query, t_attention.self.key, t_attention.self.value)
        t_self = [[linear(h) for linear in t_linears] for h in t_in]
        t_context = [attend(*qkv, heads=t_heads) for qkv in t_self]
        t_dense = [t_attention.output.dense(c) for c in t_context]
        t_middle = [t_attention.output.LayerNorm(d + h) for d, h in zip(t_dense, t_in, strict=True)]
        kept = choose_heads(t_context, [d @ basis for d in t_dense], t_heads, HEADS)
        index = torch.tensor([h * HEAD_DIM + i for h in kept for i in range(HEAD_DIM)])
        s_linears = (s_attention.self.query, s_attention.self.key, s_attention.self.value)
        for which, linear in enumerate(s_linears):
            fit_linear(linear, hidden, [qkv[which][..., index] for qkv in t_self])
        context = [attend(*(linear(h) for linear in s_linears), heads=HEADS) for h in hidden]
        t_sum = [(d + h) @ basis for d, h in zip(t_dense, t_in, strict=True)]
        fit_linear(s_attention.output.dense, context, [t - h for t, h in zip(t_sum, hidden, strict=True)])
        summed = [s_attention.output.dense(c) + h for c, h in zip(context, hidden, strict=True)]
        middle = fit_norm(s_attention.output.LayerNorm, summed, [m @ basis for m in t_middle])

        t_before = [t_layer.intermediate.dense(m) for m in t_middle]
        energy = sum(F.gelu(b).square().sum((0, 1)) for b in t_before)
        energy = energy * (basis.T @ t_layer.output.dense.weight).square().sum(0)
        units = energy.topk(FEED_FORWARD).indices.sort().values
        fit_linear(s_layer.intermediate.dense, middle, [b[..., units] for b in t_before])
        active = [F.gelu(s_layer.intermediate.dense(m)) for m in middle]
        t_dense = [t_layer.output.dense(F.gelu(b)) for b in t_before]
        t_sum = [(d + m) @ basis for d, m in zip(t_dense, t_middle, strict=True)]
        fit_linear(s_layer.output.dense, active, [t - m for t, m in zip(t_sum, middle, strict=True)])
        summed = [s_layer.output.dense(a) + m for a, m in zip(active, middle, strict=True)]
        t_out = [states[number + 1] @ basis for states in t_states]
        hidden = fit_norm(s_layer.output.LayerNorm, summed, t_out)
        error = sum((h - t).square().sum() for h, t in zip(hidden, t_out, strict=True))
        error = error / sum(t.square().sum() for t in t_out)
        log(f"layer {number + 1}: heads {kept}, relative error {error:.3f}")

    t_pool = [teacher.bert.pooler.dense(states[-1][:, 0]) for states in t_states]
    t_logits = [teacher.classifier(p.tanh()) for p in t_pool]
    weight = teacher.classifier.weight[1] - teacher.classifier.weight[0]
    units = (torch.cat(t_pool).tanh().std(0) * weight.abs()).topk(HIDDEN).indices.sort().values
    fit_linear(student.bert.pooler.dense, [h[:, 0] for h in hidden], [p[:, units] for p in t_pool])
    pooled = [student.bert.pooler.dense(h[:, 0]).tanh() for h in hidden]
    fit_linear(student.classifier, pooled, t_logits)
    return student, basis


# ------------------------------------------------------------------------------------- distillation


@dataclass
class Lessons:
    """What the teacher says about the training texts; tokens of all texts lie one after the other."""

    rows: list[np.ndarray]  # student ids of each text
    start: np.ndarray  # [texts] index of a text's first token in `states`
    states: np.ndarray  # [tokens, LAYERS, HIDDEN] float16: projected hidden states after each layer
    aligned: np.ndarray  # [tokens] bool: the teacher has the same token there
    logits: Tensor  # [texts, 2]
    labels: Tensor  # [texts], -1 where unknown


@torch.no_grad()
def ask_teacher(
    teacher: BertForSequenceClassification,
    teacher_tokenizer: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    basis: Tensor,
    examples: list[Example],
) -> Lessons:
    """The teacher reads with its full vocabulary; its states go to the student's tokens of the same span."""
    texts = [example.text for example in examples]
    encoded = tokenizer(texts, truncation=True, max_length=128, return_offsets_mapping=True)
    t_encoded = teacher_tokenizer(texts, truncation=True, max_length=128, return_offsets_mapping=True)
    rows = [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    t_rows = [np.array(ids, dtype=np.int32) for ids in t_encoded["input_ids"]]
    start = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    states = np.zeros((start[-1], LAYERS, HIDDEN), dtype=np.float16)
    aligned = np.zeros(start[-1], dtype=bool)
    logits = torch.empty(len(texts), 2)
    began, done = time.monotonic(), 0
    for number, batch in enumerate(batches_by_length(np.array([len(row) for row in t_rows]), 1536, None)):
        ids, mask = pad([t_rows[i] for i in batch])
        output = teacher(ids, attention_mask=mask, output_hidden_states=True)
        logits[torch.from_numpy(batch)] = output.logits
        projected = torch.stack([h @ basis for h in output.hidden_states[1:]], dim=2).half().numpy()
        for place, i in enumerate(batch):
            spans, t_spans = encoded["offset_mapping"][i], t_encoded["offset_mapping"][i]
            where = {span: index for index, span in enumerate(t_spans[1:-1], start=1)}
            pairs = [(k, where[span]) for k, span in enumerate(spans[1:-1], start=1) if span in where]
            pairs += [(0, 0), (len(spans) - 1, len(t_spans) - 1)]
            mine, theirs = np.array(pairs).T
            states[start[i] + mine] = projected[place, theirs]
            aligned[start[i] + mine] = True
        done += ids.numel()
        if number % 200 == 0:
            log(f"teacher: {done} tokens, {done / (time.monotonic() - began):.0f} per second")
    labels = torch.tensor([example.label for example in examples])
    return Lessons(rows, start[:-1], states, aligned, logits, labels)


def distill(
    student: BertForSequenceClassification,
    lessons: Lessons,
    evaluate: Callable[[], tuple[float, float]],
    checkpoint: Callable[[], None],
    args: argparse.Namespace,
) -> tuple[int, float]:
    """Train; `checkpoint` is called when the held-out agreement is best. Returns steps and that agreement."""
    rng = np.random.default_rng(args.seed)
    lengths = np.array([len(row) for row in lessons.rows])
    heads = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
    for head in heads:
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
    sample = torch.from_numpy(lessons.states[rng.choice(len(lessons.states), 20_000)]).float()
    sample = sample[sample.abs().sum((1, 2)) > 0]
    variance = sample.var(0).mean(-1)  # [LAYERS]
    words = student.bert.embeddings.word_embeddings.weight
    matrices = [p for p in student.parameters() if p.ndim == 2 and p is not words]
    others = [words] + [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.01},
            {"params": others + list(heads.parameters()), "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )

    def epochs() -> Iterator[np.ndarray]:
        while True:
            yield from batches_by_length(lengths, args.batch_tokens, rng)

    student.eval()  # no dropout: faster, and the teacher's states already keep it from memorising
    began = time.monotonic()
    best, seen = -1.0, 0
    sums = np.zeros(3)
    for step, batch in enumerate(epochs(), start=1):
        elapsed = (time.monotonic() - began) / (60 * args.minutes)
        progress = (step - 1) / args.steps if args.steps else min(1.0, elapsed)
        rate = min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        ids, mask = pad([lessons.rows[i] for i in batch])
        target = np.zeros((*ids.shape, LAYERS, HIDDEN), dtype=np.float16)
        weight = np.zeros((*ids.shape, 1), dtype=np.float32)
        for place, i in enumerate(batch):
            span = slice(lessons.start[i], lessons.start[i] + lengths[i])
            target[place, : lengths[i]] = lessons.states[span]
            weight[place, : lengths[i], 0] = lessons.aligned[span]
        t_states = torch.from_numpy(target).float().unbind(2)
        shares = torch.from_numpy(weight / (weight.sum() * HIDDEN))
        output = student(ids, attention_mask=mask, output_hidden_states=True)
        state_losses = [
            ((head(hidden) - t_state).square() * shares).sum() / spread
            for head, hidden, t_state, spread in zip(heads, output.hidden_states[1:], t_states, variance, strict=True)
        ]
        state_loss = sum(state_losses) / LAYERS
        index = torch.from_numpy(batch)
        log_p = F.log_softmax(output.logits / 2, -1)
        t_log_p = F.log_softmax(lessons.logits[index] / 2, -1)
        soft = 4 * F.kl_div(log_p, t_log_p, reduction="batchmean", log_target=True)
        labels = lessons.labels[index]
        known = labels >= 0
        hard = F.cross_entropy(output.logits[known], labels[known], reduction="sum") / len(labels)
        loss = (1.0 - 0.7 * progress) * state_loss + soft + 0.1 * hard
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        sums += (state_loss.item(), soft.item(), hard.item())
        finished = step == args.steps or progress == 1.0
        if step % args.evaluate_every == 0 or finished:
            match, right = evaluate()
            states, softs, hards = sums / (step - seen)
            sums[:], seen = 0, step
            mark = ""
            if match >= best:
                best, mark = match, " *"
                checkpoint()
            pace = (time.monotonic() - began) / step
            log(
                f"step {step}: states {states:.4f} soft {softs:.4f} hard {hards:.4f} | "
                f"held out: agreement {match:.4f} accuracy {right:.4f} | {pace:.3f} s/step{mark}"
            )
        if finished:
            return step, best
    raise AssertionError("unreachable")


# --------------------------------------------------------------------------------------- model card


CARD = """---
language: en
license: other
datasets:
- stanfordnlp/sst2
base_model: sentence-transformers/all-MiniLM-L6-v2
pipeline_tag: text-classification
---

# globenc default model

A small English sentiment classifier (negative / positive), so that `globenc` can be tried and tested without
downloading anything. A plain `transformers` `BertForSequenceClassification`, stored in float16.

| | |
|---|---|
| architecture | BERT, {layers} layers, hidden {hidden}, {heads} heads, feed-forward {feed_forward} |
| vocabulary | {vocab} lower-case word pieces, a subset of BERT's uncased vocabulary |
| parameters | {parameters:,} |
| files | {model_bytes:,} bytes of weights (float16), {tokenizer_bytes:,} bytes of tokenizer |
| longest input | 512 tokens (trained on texts of up to about 60 words) |

## Accuracy

On the 872 sentences of the SST-2 validation set, both models in the same run, in float32 arithmetic, the
student from the float16 file that lies here:

| | accuracy |
|---|---|
| this model | {student_accuracy:.2%} |
| teacher | {teacher_accuracy:.2%} |
| sentences where both give the same label | {agreement:.2%} |

## How it was made

`examples/train_default_model.py` in the source repository makes it from the teacher and the data.

- **Teacher:** all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers and hidden size 384, fine-tuned on SST-2.
- **Data:** the {train} phrases of SST-2's training set. {heldout:,} phrases of eight words or more, all from
  held-out sentences, selected the checkpoint (agreement with the teacher: {heldout_agreement:.2%}); these
  sentences and all their parts were kept out of training. The validation sentences were only used for the
  numbers above.
- **Start:** the teacher projected on the leading {hidden} directions of its hidden states, half of its heads
  and feed-forward units, every matrix refitted by least squares, layer by layer.
- **Training:** {lessons:,} texts ({training:,} phrases, the rest augmented: constituents swapped between
  sentences, words replaced by neighbours or masked, phrases joined or cut), labelled by the teacher;
  {steps:,} steps of at most {batch_tokens:,} tokens ({passes:.2f} passes over the texts), AdamW, peak
  learning rate {learning_rate:g}, cosine decay, no dropout. Loss: the teacher's logits (Kullback-Leibler
  divergence, temperature 2), its hidden states after every layer through a learned linear map, and a little
  of the human labels.
- **Seed:** {seed}.
- **Hardware and time:** {threads} CPU threads, no GPU, {minutes:.0f} minutes in all; PyTorch {torch},
  transformers {transformers}.

## Licences

The teacher all-MiniLM-L6-v2 is under Apache-2.0. SST-2 (Socher et al., 2013, "Recursive Deep Models for
Semantic Compositionality Over a Sentiment Treebank") is distributed for research and has no stated open
licence; none of its text is redistributed here.

## Limits

English only, and trained on sentences from movie reviews: other kinds of text and longer ones get a label,
but not a reliable one. There is no neutral class. The model reproduces the biases of its teacher and its
data. It is meant for demonstration and tests of attribution methods, not for decisions about anything.
"""


# --------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="fine-tuned BERT classifier")
    parser.add_argument("--train", type=Path, required=True, help="jsonl(.gz): sentence, label")
    parser.add_argument("--validation", type=Path, required=True, help="for the final report only")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model to")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, default=30.0, help="train for about so long (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=7800)
    parser.add_argument("--heldout", type=int, default=2000, help="phrases for selection")
    parser.add_argument("--augmented", type=int, default=80_000, help="augmented texts")
    parser.add_argument("--calibration", type=int, default=4000, help="sentences for the start")
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    began = time.monotonic()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    teacher = BertForSequenceClassification.from_pretrained(args.teacher, dtype=torch.float32).eval()
    teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    examples = read_examples(args.train)
    sentences = find_sentences(examples)
    train, heldout = split_heldout(examples, sentences, args.heldout, rng)
    left = {example.text for example in train}
    sentences = [example for example in sentences if example.text in left]
    log(f"{len(train)} training phrases ({len(sentences)} whole sentences), {len(heldout)} held out")

    vocab = teacher_tokenizer.get_vocab()
    counts = Counter(piece for e in sentences for piece in teacher_tokenizer.tokenize(e.text))
    pieces = choose_pieces(vocab, counts, args.vocab_size)
    write_tokenizer(args.teacher, pieces, args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    piece_ids = torch.tensor([vocab[piece] for piece in pieces])
    covered = sum(counts[piece] for piece in pieces) / sum(counts.values())
    log(f"{len(pieces)} pieces cover {covered:.4f} of the training sentences' tokens")

    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    calibration = rng.sample(sentences, min(args.calibration, len(sentences)))
    calibration_rows = encode(tokenizer, [e.text for e in calibration])
    student, basis = cut_student(teacher, config, piece_ids, calibration_rows)

    heldout_rows = encode(tokenizer, [e.text for e in heldout])
    heldout_teacher = predict(teacher, encode(teacher_tokenizer, [e.text for e in heldout]))

    def evaluate() -> tuple[float, float]:
        logits = predict(student, heldout_rows)
        return agreement(logits, heldout_teacher), accuracy(logits, heldout)

    def checkpoint() -> None:
        copy.deepcopy(student).half().save_pretrained(args.output)

    log("held out at the start: agreement {:.4f} accuracy {:.4f}".format(*evaluate()))
    augmenter = Augmenter(train, nearest_words(teacher, vocab), rng)
    texts = train + [augmenter.sample() for _ in range(args.augmented)]
    for example in rng.sample(texts[len(train) :], 5):
        log(f"augmented: {example.text}")
    lessons = ask_teacher(teacher, teacher_tokenizer, tokenizer, basis, texts)
    log(f"{len(lessons.aligned)} tokens, {lessons.aligned.mean():.4f} of them are also the teacher's")
    steps, heldout_agreement = distill(student, lessons, evaluate, checkpoint, args)

    lengths = np.array([len(row) for row in lessons.rows])

    shipped = BertForSequenceClassification.from_pretrained(args.output, dtype=torch.float32).eval()
    if not all(parameter.isfinite().all() for parameter in shipped.parameters()):
        raise ValueError("the shipped weights are not finite")
    validation = read_examples(args.validation)
    validation_texts = [e.text for e in validation]
    student_logits = predict(shipped, encode(tokenizer, validation_texts))
    teacher_logits = predict(teacher, encode(teacher_tokenizer, validation_texts))
    facts = {
        "layers": LAYERS,
        "hidden": HIDDEN,
        "heads": HEADS,
        "feed_forward": FEED_FORWARD,
        "vocab": len(pieces),
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "model_bytes": (args.output / "model.safetensors").stat().st_size,
        "tokenizer_bytes": (args.output / "tokenizer.json").stat().st_size,
        "student_accuracy": accuracy(student_logits, validation),
        "teacher_accuracy": accuracy(teacher_logits, validation),
        "agreement": agreement(student_logits, teacher_logits),
        "train": f"{len(examples):,}",
        "heldout": len(heldout),
        "heldout_agreement": heldout_agreement,
        "training": len(train),
        "lessons": len(texts),
        "steps": steps,
        "passes": steps / len(batches_by_length(lengths, args.batch_tokens, None)),
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "threads": args.threads,
        "minutes": (time.monotonic() - began) / 60,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    log(json.dumps(facts))


if __name__ == "__main__":
    main()
