"""Read a pool of traces a chunk at a time and assess it in order: in one process, in several, or on Ray Data.

    pool = Pool(("pool.jsonl",))
    parts = assess_pool(pool, assessor, processes=4)
    parts = assess_on_ray(pool, assessor, "auto")                 # the same parts, from a running Ray cluster

An `Assessor`'s result for an item does not depend on the other items, so all of these join to the same bytes.
"""

import pickle
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rbfast.curation import text
from rbfast.curation.assess import AssessedPart, Assessor
from rbfast.data.formats import AUTO, FormatOptions
from rbfast.data.readers import PATIENCE, read_native_rows
from rbfast.data.trace import TraceError
from rbfast.utils.packages import import_optional

CHUNK = 1024  # rows

Source = str | Path
PoolRow = tuple[str, Any]
"""The location of a row ("file:line"), and the fields of its trace, or a TraceError if it has none."""


@dataclass(frozen=True)
class Pool:
    """The sources of traces, how to read them, and whether rows keep the fields that a trace does not have."""

    sources: tuple[Source, ...]
    options: FormatOptions = AUTO
    keep_fields: bool = False


def pool_rows(pool: Pool) -> Iterator[PoolRow]:
    """Every row of the pool, one at a time; a row with several traces becomes several rows."""
    return chain.from_iterable(
        read_native_rows(source, pool.options, keep_fields=pool.keep_fields) for source in pool.sources
    )


def recognise_formats(pool: Pool) -> dict[Source, list[str]]:
    """The formats of the first rows of each source, the most frequent first.

    Raises:
        TraceError: a source has rows, but none of its first 100 is a trace.
    """
    formats: dict[Source, list[str]] = {}
    for source in pool.sources:
        names: list[str] = []
        rows = islice(read_native_rows(source, pool.options, note=names.append), PATIENCE)
        errors = [row for _, row in rows if isinstance(row, TraceError)]
        if errors and not names:
            raise TraceError(f"{source}: none of the first {len(errors)} rows is a trace, the first: {errors[0]}")
        formats[source] = [name for name, _ in Counter(names).most_common()]
    return formats


def chunks(pool: Pool, size: int) -> Iterator[list[PoolRow]]:
    """The rows of the pool, `size` at a time."""
    rows = pool_rows(pool)
    while chunk := list(islice(rows, size)):
        yield chunk


def assess_pool(pool: Pool, assessor: Assessor, processes: int) -> Iterator[AssessedPart]:
    """The assessed parts of a pool, in order. This process reads; with `processes` > 1, workers assess.

    Raises:
        ValueError: there are several processes, and the assessor is not picklable.
    """
    read = chunks(pool, CHUNK)
    if processes == 1:
        yield from (assessor(chunk, threads=text.cores()) for chunk in read)
        return
    try:
        pickle.dumps(assessor)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "with several processes, quality, difficulty, verify and embed must be functions of a module, not lambdas "
            f"or inner functions: {error}"
        ) from error
    # Spawn: a forked process inherits locks, but not the threads that hold them.
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (assessor,)) as workers:
        ahead = deque(workers.submit(_assess_chunk, chunk) for chunk in islice(read, 2 * processes))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(workers.submit(_assess_chunk, chunk) for chunk in islice(read, 1))


_worker: Assessor


def _start_worker(assessor: Assessor) -> None:
    global _worker
    _worker = assessor


def _assess_chunk(chunk: list[PoolRow]) -> AssessedPart:
    return _worker(chunk)


def assess_on_ray(pool: Pool, assessor: Assessor, address: str) -> Iterator[AssessedPart]:
    """The assessed parts of a pool, in order. One worker, on this machine, reads; the others, on any node, assess.

    Args:
        address: for `ray.init`: "auto", "local", host:port. An open session is reused, and left open.

    Raises:
        ImportError: Ray Data is not installed.
        Exception: whatever reading or assessing raised.
    """
    ray: Any = import_optional("ray", "pools on Ray", install="'rbfast[ray]'")
    import_optional("ray.data", "pools on Ray", install="'rbfast[ray]'")
    own = not ray.is_initialized()
    if own:
        ray.init(address, log_to_driver=False)
    try:
        data: Any = ray.data.from_items([{"pool": pickle.dumps(_with_absolute_paths(pool))}])
        data.context.execution_options.preserve_order = True
        data.context.target_max_block_size = 1  # byte: each chunk is a block, and each block a task
        data.context.enable_progress_bars = False
        # The reader mostly waits for the other workers, so it must not reserve a core.
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        data = data.flat_map(_read_pickled, fn_kwargs={"size": CHUNK}, num_cpus=0, label_selector=here)
        for row in data.map(_assess_pickled, fn_kwargs={"assessor": assessor}, num_cpus=1).iter_rows():
            part = pickle.loads(row["part"])
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        if own:
            ray.shutdown()


def _with_absolute_paths(pool: Pool) -> Pool:
    """The pool with absolute paths: Ray workers have other working folders."""
    return replace(pool, sources=tuple(Path(s).resolve() if Path(s).exists() else s for s in pool.sources))


def _read_pickled(row: Mapping[str, bytes], size: int) -> Iterator[dict[str, bytes]]:
    """The chunks of a pool, pickled. An error is passed on as the last chunk: Ray would change its type and message."""
    try:
        yield from ({"chunk": pickle.dumps(chunk)} for chunk in chunks(pickle.loads(row["pool"]), size))
    except Exception as error:
        yield {"chunk": pickle.dumps(error)}


def _assess_pickled(row: Mapping[str, bytes], assessor: Assessor) -> dict[str, bytes]:
    """The pickled part of a chunk, or the pickled error in its place."""
    chunk = pickle.loads(row["chunk"])
    try:
        return {"part": pickle.dumps(chunk if isinstance(chunk, Exception) else assessor(chunk))}
    except Exception as error:
        return {"part": pickle.dumps(error)}
