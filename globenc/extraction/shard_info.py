"""What a shard says about itself, and the keys of a Parquet file's metadata under which it stands."""

from __future__ import annotations

from dataclasses import dataclass

PROVENANCE_KEY, SHARD_KEY, REJECTS_KEY = b"globenc", b"globenc.shard", b"globenc.rejects"
WRITTEN_KEY = b"globenc.written"


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says about itself in its metadata; `rows` are the attributed ones, `unknown` those of which the
    tokenizer knows no token; `digest` is of its own rows, `input_digest` of the first shard's."""

    index: int
    first_row: int
    end_row: int
    rows: int
    rejected: int
    tokens: int
    truncated: int
    unknown: int
    digest: str
    input_digest: str
