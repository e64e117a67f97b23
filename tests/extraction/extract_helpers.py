"""What tests of extractions share: a corpus, the calls, and when two extractions are the same."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import LETTERS

import globenc
from globenc.extraction.rows import Columns, Reader
from globenc.extraction.sources import inputs_of

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and files of POSIX")
PART = "data/part-00002.parquet"
GENERATOR = np.random.default_rng(0)


def random_text(words: int) -> str:
    return " ".join("".join(GENERATOR.choice(LETTERS, GENERATOR.integers(1, 4))) for _ in range(words))


TEXTS = [random_text(1 + k * 7 % 11) for k in range(30)]
PAIRS = [random_text(1 + k * 5 % 4) for k in range(30)]
ROWS = [
    {"text": text, "pair": pair, "name": f"row-{k}", "gold": k % 3}
    for k, (text, pair) in enumerate(zip(TEXTS, PAIRS, strict=True))
]
BAD = {3: None, 11: "", 12: 7, 29: "\N{ZERO WIDTH SPACE}"}
SOME_BAD = [{**row, "text": BAD.get(k, row["text"])} for k, row in enumerate(ROWS)]
REASONS = {
    3: "text column 'text' is null",
    11: "text column 'text' is empty",
    12: "text column 'text' holds a value of type int, not text",
    29: "the tokenizer finds no token in the text",
}


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(inputs, folder, model, **options) -> globenc.extraction.run.ExtractSummary:
    return globenc.extract(inputs, folder, model=model, **{"progress": False, "shard_rows": 7, **options})


def quietly(*arguments, **options):
    """`run`, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*arguments, **options)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time and content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_same(folder: Path, other: Path) -> None:
    """Two extractions with the same rows, and the same bytes in every file but the times in the manifests."""
    assert globenc.load_extract(folder).equals(globenc.load_extract(other), check_metadata=True)
    names, others = (
        sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file() and path.name != ".lock")
        for place in (folder, other)
    )
    assert names == others
    for name in names:
        if name.name != "manifest.json":
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, other)]
    for manifest in manifests:
        for name in ("started", "finished", "sha256", "inputs"):
            del manifest[name]
    assert manifests[0] == manifests[1]


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def rejects_in(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def as_rows(texts, **columns):
    return [{"text": text, **{name: values[k] for name, values in columns.items()}} for k, text in enumerate(texts)]


def read(inputs, columns: Columns | None = None, format_=None, shard_rows=100, limit=None, strict=False):
    """The rows of all shards of some inputs."""
    columns = columns or Columns()
    sources = inputs_of(inputs, format_)
    for source in sources:
        source.check(columns.names())
    return list(Reader(sources, columns, shard_rows, limit, strict))


def texts_of(shards) -> list[str]:
    return [example.text for shard in shards for example in shard.examples]


@contextlib.contextmanager
def at_a_shard(act: Callable[[], object], number: int = 2):
    """Something that happens before the model sees a shard; before the first one, nothing writes beside it."""
    score, done = globenc.GlobEnc.score, []

    def acting(self, encodings, **options):
        done.append(1)
        if len(done) == number:
            act()
        return score(self, encodings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(globenc.GlobEnc, "score", acting)
        yield


class KilledError(BaseException):
    """As if the program ended."""


@contextlib.contextmanager
def killed_at(number: int, stage: str):
    """The end of the program before or after one of its renames and removals; `assert` that it came, if it must."""
    count = 0

    def dying(act):
        def counted(path, *arguments, **options):
            nonlocal count
            count += 1
            if count > number or (count, stage) == (number, "before"):
                raise KilledError
            found = act(path, *arguments, **options)
            if count == number:
                raise KilledError
            return found

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        yield
