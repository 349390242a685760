"""Decodes and encodes image files in several processes, in order."""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from suite.data.decoding import Storage, Stored, Task, store, store_all
from suite.errors import DataError
from suite.run.processes import obey_the_parent

_PORTION_BYTES = 8 << 20


def store_in_order(
    tasks: Iterator[Task], num_tasks: int, storage: Storage, num_workers: int
) -> Generator[Stored, None, None]:
    """The results of `store`, in order, from `num_workers` processes, or from this process if `num_workers` is 1.

    Raises:
        DataError: a worker was killed.
    """
    if num_workers == 1 or num_tasks <= 1:
        yield from (store(task, storage) for task in tasks)
        return
    # Enough tasks at a time to keep the overhead small, few enough that the largest images fit in memory.
    side = storage.max_resolution or 4096
    size = max(1, min(16, _PORTION_BYTES // (3 * side**2), num_tasks // num_workers))
    portions = iter(lambda: list(islice(tasks, size)), [])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([store.__module__])
    pool = ProcessPoolExecutor(min(num_workers, num_tasks), context, obey_the_parent)
    pending: deque[Future[list[Stored]]] = deque()
    try:
        for portion in islice(portions, 3 * num_workers):
            pending.append(pool.submit(store_all, portion, storage))
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(store_all, portion, storage) for portion in islice(portions, 1))
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out: run the same command with fewer --workers "
            "to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
