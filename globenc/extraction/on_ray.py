"""The engine of many processes, GPUs and machines: the same stages in a pool of Ray Data's actors.

One task beside the driver reads the inputs; actors, each with a model, turn rows into shards; the driver writes them.
A worker that dies is started again by Ray, and its shards are made again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..explainer import GlobEnc
from ..loading import ModelSource
from ..progress import Meter
from .lines import stdin_stream
from .options import Settings
from .provenance import model_hash
from .rows import Plan, Reader, ShardRows
from .sources import Input
from .store import Store
from .worker import Worker

try:
    import ray
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
except ImportError as error:
    raise ImportError(f'engine "ray" needs Ray ({error}): pip install "globenc[ray]"') from error

IN_FLIGHT = 3  # shards of an actor at once: one being encoded, one in the model, one being built


def load(source: ModelSource, known: Mapping[str, str]) -> GlobEnc:
    """A worker's model, on the GPU that Ray gave to this process, if any.

    Args:
        source: which model; its device does not count here.
        known: the hashes of the driver's model, whose dtype the weights are loaded in.

    Raises:
        ValueError: the model is not the driver's.
    """
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    explainer = GlobEnc.from_pretrained(replace(source, device=device, dtype=known["dtype"]))
    if model_hash(explainer) != known:
        raise ValueError(
            f"model {source.name!r} is another one on node {ray.util.get_node_ip_address()} than where the run began"
        )
    return explainer


@contextlib.contextmanager
def cluster(address: str | None, workers: int | None, device: Any) -> Iterator[tuple[int, bool]]:
    """A Ray cluster, started where none runs: how many workers it is to have, and whether they have GPUs.

    Raises:
        OSError: there is no cluster at the address.
        ValueError: there are fewer GPUs or CPUs than workers.
    """
    started_here = not ray.is_initialized()
    if started_here:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            _answers(address)
            ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"ray_address {address!r} is no Ray cluster that answers: {_first_line(error)}") from error
    try:
        have = ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 1.0)
        on_gpus = gpus > 0 and str(device) != "cpu"
        if device is not None and str(device).startswith("cuda") and not on_gpus:
            raise ValueError(f"device {str(device)!r}: the cluster has no GPU")
        count = workers or (gpus if on_gpus else 1)
        if count > (gpus if on_gpus else cpus):
            raise ValueError(f"workers must be at most the {gpus} GPUs or {int(cpus)} CPUs of the cluster, got {count}")
        yield count, on_gpus
    finally:
        if started_here:
            ray.shutdown()


def run(
    plan: Plan,
    source: ModelSource,
    known: Mapping[str, str],
    settings: Settings,
    store: Store,
    meter: Meter,
    workers: int,
    gpus: bool,
) -> None:
    """Make the shards of a plan.

    Raises:
        what reading, the model or writing raises; OSError where Ray itself gives up.
    """
    cpus = ray.cluster_resources().get("CPU", 1.0)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # every shard on its own, as soon as it is there
    context.enable_progress_bars = False
    with _standard_input(plan) as plan, _context(context), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about itself
        node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        plan_rows = ray.data.read_datasource(
            _PlanSource(plan.reader, plan.done), num_cpus=0, label_selector=node, override_num_blocks=1
        )
        shards = plan_rows.map_batches(
            _Actor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"source": source, "known": known, "settings": settings},
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=2 * IN_FLIGHT,
                max_concurrent_calls_per_actor=IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            num_gpus=1 if gpus else 0,
            num_cpus=1 if gpus else max(1, int(cpus / workers)),
        )
        try:
            for batch in shards.iter_batches(batch_size=None, batch_format="pyarrow"):
                for message in batch["message"].to_pylist():
                    _receive(pickle.loads(message), plan, store, meter)
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray gave up: {_first_line(error)}") from error


def _receive(message: Any, plan: Plan, store: Store, meter: Meter) -> None:
    """One message of the actors at the driver: a shard, an error, rows that are done already, or the end."""
    if isinstance(message, BaseException):
        raise message
    kind, *values = message
    if kind == "end":
        (plan.end_row,) = values
    elif kind == "skip":
        meter.skip(*values)
    else:
        info, content, fraction = values
        if info.index in store.shards:
            return  # done twice, because a worker died between doing and saying so
        store.write(info, content)
        meter.reach(info.end_row, fraction)
        meter.advance(info.rows, info.tokens)


class _PlanSource(Datasource):
    """The plan as a Ray data set with a row for each shard, read by one task where the driver is."""

    def __init__(self, reader: Reader, done: Mapping[int, tuple[int, int, str, int]]):
        super().__init__()
        self._reader, self._done = reader, done

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        reader, done = self._reader, self._done
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: _messages(reader, done), metadata)]


def _messages(reader: Reader, done: Mapping[int, tuple[int, int, str, int]]) -> Iterator[pa.Table]:
    """What the reading task has to say: the rows of a shard, rows that are done already, an error, the end."""
    skipped: list[tuple[int, int, float | None]] = []
    plan = Plan(reader, done, lambda *values: skipped.append(values))
    try:
        for rows in plan:
            yield _table(rows)
        for values in skipped:
            yield _table(("skip", *values))
        yield _table(("end", plan.end_row))
    except Exception as error:  # raised again at the driver, without Ray's traceback around it
        yield _table(_portable(error))


class _Actor:
    """A model in a process of its own. Several threads call it; each stage has one at a time."""

    def __init__(self, source: ModelSource, known: Mapping[str, str], settings: Settings):
        self._scoring = threading.Lock()
        self._error: BaseException | None = None
        try:
            self._worker = Worker(load(source, known), settings)
        except Exception as error:  # as above
            self._error = _portable(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _table(*(self._answer(pickle.loads(message)) for message in batch["message"].to_pylist()))

    def _answer(self, message: Any) -> Any:
        if not isinstance(message, ShardRows):
            return message
        if self._error is not None:
            return self._error
        try:
            shard = self._worker.encode(message)
            with self._scoring:
                shard = self._worker.score(shard)
            return ("shard", *self._worker.build(shard), message.fraction)
        except Exception as error:  # as above
            return _portable(error)


def _table(*messages: Any) -> pa.Table:
    return pa.table({"message": pa.array([pickle.dumps(message) for message in messages], pa.large_binary())})


def _portable(error: BaseException) -> BaseException:
    """The same error without what cannot travel."""
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error class that cannot be made again from its arguments
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _standard_input(plan: Plan) -> Iterator[Plan]:
    """The plan with standard input, which only this process has, put into a file."""
    sources: Sequence[Input] = plan.reader.inputs
    if all(source.name != "-" for source in sources):
        yield plan
        return
    with tempfile.TemporaryDirectory(prefix="globenc-") as folder:
        path = Path(folder) / "stdin"
        with open(path, "wb") as file:
            shutil.copyfileobj(stdin_stream(), file)
        size = path.stat().st_size
        plan.reader.inputs = [
            replace(source, path=str(path), size=size) if source.name == "-" else source for source in sources
        ]
        yield plan


@contextlib.contextmanager
def _context(context: Any) -> Iterator[None]:
    """Ray Data's settings, and nothing but globenc's own words about what goes wrong, for a while."""
    before = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    ray.data.DataContext._set_current(context)
    try:
        yield
    finally:
        ray.data.DataContext._set_current(before)
        logger.setLevel(level)


def _answers(address: str | None) -> None:
    """Whether anything listens at host:port, which Ray itself takes minutes to find out.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__
