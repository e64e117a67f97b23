"""The three stages of a shard, for every engine: encode its texts, run the model, build the Parquet file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..batching import BatchScores
from ..errors import blames_text, in_a_line, out_of_memory, warn_caller
from ..explainer import GlobEnc
from ..rollouts import check_position
from ..tokenization import Encoding
from .options import Settings
from .passed_columns import with_passed
from .rows import BadRowError, Example, Reject, ShardRows
from .shard_info import PROVENANCE_KEY, REJECTS_KEY, SHARD_KEY, ShardInfo
from .tables import ScoredText, TableBuilder, shard_bytes

PATIENCE = 16  # texts that fail in a row until the model is tried with a plain one
PLAIN_TEXTS = ("a", "1", "\u7684")
LEAN = 1 << 16  # characters behind which a long text is dropped when nothing reads it any more


@dataclass
class Shard:
    """A shard on its way: its rows, then also their encodings, then their scores."""

    rows: ShardRows
    examples: list[Example]
    rejects: list[Reject]
    encodings: list[Encoding] = field(default_factory=list)
    scored: list[ScoredText] = field(default_factory=list)


class Worker:
    """A model with the stages of its shards. Each stage may have a thread of its own.

    Args:
        explainer: the model.
        settings: what is asked for.
        advance: told after every batch how many texts and tokens it had.
    """

    def __init__(self, explainer: GlobEnc, settings: Settings, advance: Callable[[int, int], None] | None = None):
        self.explainer, self.settings = explainer, settings
        self.budget = settings.batch_tokens or explainer.budget(settings.options.class_scores)
        self._advance = advance or (lambda texts, tokens: None)
        self._failures = 0  # texts in a row that the model could not score
        self._tables = TableBuilder(explainer, settings.options)

    def encode(self, rows: ShardRows) -> Shard:
        """The first stage: texts to tokens; what has none, or not the position asked for, is rejected."""
        options = self.settings.options
        shard = Shard(rows, [], list(rows.rejects))
        texts = [example.text for example in rows.examples]
        pairs = [str(example.pair) for example in rows.examples] if options.pair_column is not None else None
        limit = self.explainer.limit(options.max_length)
        encodings = self.explainer.encode_each(texts, pairs, limit) if texts else []
        self._check_encoder(encodings, limit)
        del texts, pairs
        for example, encoding in zip(rows.examples, encodings, strict=True):
            if isinstance(encoding, BaseException):
                self._reject(shard, example, in_a_line(encoding))
                continue
            if encoding.empty:
                self._reject(shard, example, "the tokenizer finds no token in the text")
                continue
            try:
                check_position(options.position, len(encoding), many=True)
            except ValueError as error:
                self._reject(shard, example, str(error))
                continue
            shard.examples.append(self._lean(example, encoding))
            shard.encodings.append(encoding)
        rows.examples, rows.rejects = [], []  # the texts that are needed further on are the shard's
        return shard

    def _check_encoder(self, encodings: Sequence[Encoding | BaseException], limit: int | None) -> None:
        """Raise an error that every text has as it is, where a plain one has it too: it is no text's."""
        errors = [encoding for encoding in encodings if isinstance(encoding, BaseException)]
        if errors and len(errors) == len(encodings) and not any(self._plain_texts(limit)):
            raise errors[0]

    def _plain_texts(self, limit: int | None) -> Iterator[Encoding]:
        """Plain texts, which may be none of the corpus's, if they can be encoded."""
        for text in PLAIN_TEXTS:
            pairs = None if self.settings.options.pair_column is None else [text]
            (encoding,) = self.explainer.encode_each([text], pairs, limit)
            if isinstance(encoding, Encoding):
                yield encoding

    def _lean(self, example: Example, encoding: Encoding) -> Example:
        """An example without those parts of long texts that nothing reads any more: Python holds up to four bytes a
        character."""
        text, pair = example.text, example.pair
        if max(len(text), len(pair or "")) <= LEAN or (self.settings.options.words and encoding.offsets is None):
            return example
        whole = (text.encode(), None if pair is None else pair.encode()) if self.settings.options.keep_text else None
        end = LEAN if encoding.offsets is None else int(encoding.offsets.max(initial=0)) + LEAN
        return replace(example, text=text[:end], pair=None if pair is None else pair[:end], whole_texts=whole)

    def score(self, shard: Shard) -> Shard:
        """The second stage: every text once through the model, in batches of like length. A batch that fails is
        halved until the text that fails alone is found; that one is rejected.

        Raises:
            Exception: what the model raises for any text, also for a plain one that is none of the corpus's.
        """
        lengths = [len(encoding) for encoding in shard.encodings]
        scored: dict[int, ScoredText] = {}
        pending = self.explainer.batches(lengths, self.budget)
        while pending:
            batch, *pending = pending
            scores = self._score([shard.encodings[i] for i in batch])
            if isinstance(scores, BatchScores):
                self._failures = 0
                scored.update(self._rows(shard, batch, scores))
                self._advance(len(batch), sum(lengths[i] for i in batch))
            else:
                pending = self._split(shard, batch, pending, scores)
        shard.scored = [scored[i] for i in sorted(scored)]
        return shard

    def _score(self, encodings: list[Encoding]) -> BatchScores | BaseException:
        """The scores of a batch, or the error where it may be a text's or for want of memory."""
        try:
            return self._through_model(encodings)
        except BaseException as error:
            if not out_of_memory(error) and not blames_text(error):
                raise
            return error.with_traceback(None)  # frees what the model had in memory

    def _through_model(self, encodings: list[Encoding], **changed: Any) -> BatchScores:
        """The scores of a batch; `changed`: other options than those asked for."""
        options = self.settings.options
        scored = self.explainer.score(encodings, **{**options.model_options, **changed})
        if options.class_scores and scored.explained is None:
            raise ValueError(
                f"{type(self.explainer.model).__name__} predicts nothing for a text that could be explained"
            )
        return scored

    def _split(
        self, shard: Shard, batch: list[int], pending: list[list[int]], failure: BaseException
    ) -> list[list[int]]:
        """The batches still to do behind one that failed: it is halved, or its only text rejected."""
        if out_of_memory(failure):
            return self._shrunk(shard, batch, pending)
        if len(batch) > 1:
            return [batch[: len(batch) // 2], batch[len(batch) // 2 :], *pending]
        self._check_model(failure, last=not pending)
        self._reject(shard, shard.examples[batch[0]], in_a_line(failure))
        return pending

    def _check_model(self, failure: BaseException, last: bool) -> None:
        """Raise the error of a text where no text at all goes through the model, also one that worked before; looked at
        when several texts in a row, or the last ones of a shard, have failed."""
        self._failures += 1
        if self._failures < PATIENCE and not last:
            return
        if not self._takes_plain_text():
            raise failure
        self._failures = 0

    def _takes_plain_text(self) -> bool:
        """Whether the model scores a plain text.

        Raises:
            Exception: it fails for what is the machine's fault.
        """
        position = self.settings.options.position if isinstance(self.settings.options.position, str) else 0
        for encoding in self._plain_texts(self.explainer.limit(self.settings.options.max_length)):
            try:
                self._through_model([encoding], position=position)
            except Exception as error:
                if not blames_text(error):
                    raise
            else:
                return True
        return False

    def _shrunk(self, shard: Shard, batch: list[int], pending: list[list[int]]) -> list[list[int]]:
        """The batches still to do, for half the memory of one that did not fit."""
        lengths = [len(encoding) for encoding in shard.encodings]
        if self.explainer.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._takes_plain_text()  # where memory is too short even for that, no text is to blame
            reason = f"out of memory: its {lengths[batch[0]]:,} tokens do not fit; lower max_length"
            self._reject(shard, shard.examples[batch[0]], reason)
            return pending
        tokens = len(batch) * max(lengths[i] for i in batch)
        self.budget = max(1, min(self.budget, tokens) // 2)
        warn_caller(f"out of memory: going on with batches of {self.budget:,} tokens")
        rest = sorted(i for batch in [batch, *pending] for i in batch)
        return [[rest[k] for k in chosen] for chosen in self.explainer.batches([lengths[i] for i in rest], self.budget)]

    def _rows(self, shard: Shard, batch: list[int], scored: BatchScores) -> dict[int, ScoredText]:
        whole = self.settings.options.position == "all" if isinstance(self.settings.options.position, str) else False
        rows = {}
        for k, i in enumerate(batch):
            encoding = shard.encodings[i]
            parts = scored.of(k, len(encoding), whole)
            explained = None if scored.explained is None else scored.explained.of(k, len(encoding))
            rows[i] = ScoredText(shard.examples[i], encoding, *parts, scored.predictions[k], explained)
        return rows

    def _reject(self, shard: Shard, example: Example, reason: str) -> None:
        reject = Reject(example.row, example.input, example.line, reason)
        if self.settings.strict:
            raise BadRowError(str(reject))
        shard.rejects.append(reject)

    def build(self, shard: Shard) -> tuple[ShardInfo, bytes]:
        """The third stage: the shard's Parquet file."""
        rows, rejects = shard.rows, sorted(shard.rejects, key=lambda reject: reject.row)
        encodings = [scored.encoding for scored in shard.scored]
        info = ShardInfo(
            index=rows.index,
            first_row=rows.first_row,
            end_row=rows.end_row,
            rows=len(shard.scored),
            rejected=len(rejects),
            tokens=sum(len(encoding) for encoding in encodings),
            truncated=sum(encoding.lost > 0 for encoding in encodings),
            unknown=sum(encoding.unknown for encoding in encodings),
            digest=rows.digest,
            input_digest=rows.input_digest,
        )
        examples = [scored.example for scored in shard.scored]
        passed = {"id": ([example.id for example in examples], rows.id_type)}
        if self.settings.options.label_column is not None:
            passed["gold_label"] = ([example.gold for example in examples], rows.gold_type)
        table = self._tables.table(shard.scored).replace_schema_metadata(
            {
                PROVENANCE_KEY: self.settings.provenance,
                SHARD_KEY: json.dumps(asdict(info)),
                # a name of an input may hold half a surrogate pair, which JSON writes so too
                REJECTS_KEY: json.dumps([asdict(reject) for reject in rejects], ensure_ascii=False).encode(
                    errors="backslashreplace"
                ),
            }
        )
        for name, (values, kind) in passed.items():
            table = with_passed(table, name, values, kind)
        shard.examples, shard.scored = [], []  # the table has what is needed of them, and a text may be long
        del examples, passed
        return info, shard_bytes(table)
