"""The engine of one process: reading and encoding ahead, the model, building and writing behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..progress import Meter
from .rows import Plan
from .store import Store
from .worker import Shard, Worker

T = TypeVar("T")


def run(plan: Plan, worker: Worker, store: Store, meter: Meter) -> None:
    """Make the shards of a plan. On an exception, KeyboardInterrupt among them, what the model has finished is written
    still, and the shard in its hands is dropped whole."""
    with ThreadPoolExecutor(1, "globenc-write") as behind:
        writing: Future[None] | None = None

        def write(shard: Shard) -> None:
            store.write(*worker.build(shard))

        for shard in ahead(worker.encode(rows) for rows in plan):
            meter.reach(shard.rows.end_row, shard.rows.fraction)
            scored = worker.score(shard)
            if writing is not None:
                writing.result()
            writing = behind.submit(write, scored)
        if writing is not None:
            writing.result()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in another thread while the one before is used."""
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(1)
    stopped = threading.Event()

    def put(more: bool, item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return made.put((more, item), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(True, item)
                if stopped.is_set():
                    return
        except BaseException as error:  # raised again where the items are used
            put(False, error)
        else:
            put(False, None)

    # a daemon: one that waits for a line of standard input must not keep the process from ending
    threading.Thread(target=make, name="globenc-read", daemon=True).start()
    try:
        while True:
            more, item = made.get()
            if not more:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
