"""One task a shard: in this process, in a pool of processes, on a Ray cluster, or a part of them.

A task is a function of picklable arguments that writes its own file whole and may be called again;
its answer is small.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from ..core.errors import ConfigError, OutlayError, require

Engine = Literal["local", "ray"]
Task = TypeVar("Task")


def run_tasks(
    function: Callable[[Task], Any],
    tasks: Sequence[Task],
    *,
    engine: Engine = "local",
    workers: int = 1,
) -> Iterator[Any]:
    """The tasks' answers, as they come.

    Args:
        function: Importable by name.
        tasks: One argument each.
        engine: "local", or "ray": the cluster at `RAY_ADDRESS`, or one started here.
        workers: Processes of the local engine, and of a Ray that is started here; 1 stays in this
            process.

    Raises:
        OutlayError: If a worker process died.
    """
    if engine == "ray":
        return _on_ray(function, tasks, workers)
    if workers == 1 or len(tasks) < 2:
        return map(function, tasks)
    return _in_pool(function, tasks, min(workers, len(tasks)))


def part_of(text: str) -> tuple[int, int]:
    """`0/4` as (0, 4): which part of how many.

    Raises:
        ConfigError: If it is not such a text.
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ConfigError(f"--shard {text!r} is not allowed", "write it as 0/4 to 3/4")
    return int(first), int(second)


def _start_worker() -> None:
    """Numerical libraries share the machine with the other workers; none outlives its parent."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    import pyarrow as pa

    pa.set_cpu_count(1)


def _in_pool(function: Callable[[Task], Any], tasks: Sequence[Task], workers: int) -> Iterator[Any]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise OutlayError(
            "a worker process died (killed, or out of memory)",
            "the same command goes on from what is finished; fewer --workers need less memory",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(function: Callable[[Task], Any], tasks: Sequence[Task], workers: int) -> Iterator[Any]:
    ray: Any = require("ray", "ray")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        own = {"address": address} if address else {"num_cpus": workers}
        ray.init(**own, log_to_driver=False, include_dashboard=False, configure_logging=False)
    # Tasks may be called again, so a lost worker costs only its own shard.
    remote = ray.remote(num_cpus=1, max_retries=5)(function)
    waiting = [remote.remote(task) for task in tasks]
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(done[0])
