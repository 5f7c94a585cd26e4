"""How threads share the parts of a call."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def share(
    work: Callable[[T], R],
    items: Sequence[T],
    threads: int,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[R]:
    """The results of `work` on each item, in their order; this thread works too, and the others `within` a context."""
    if threads < 2 or len(items) < 2:
        return [work(item) for item in items]
    results: list[Any] = [None] * len(items)
    waiting = iter(range(len(items)))
    helping, failures = 0, []
    turn = threading.Condition()

    def worker() -> None:
        while True:
            with turn:
                i = next(waiting, None)
            if i is None:
                return
            results[i] = work(items[i])

    def helper() -> None:
        nonlocal waiting, helping
        with turn:
            helping += 1
        try:
            with within():
                worker()
        except BaseException as failure:
            failures.append(failure)
            waiting = iter(())
        with turn:
            helping -= 1
            turn.notify()

    try:
        _start(helper, min(threads, len(items)) - 1, threads - 1)
        worker()
    except BaseException as failure:
        failures.append(failure)
    while True:
        try:
            with turn:
                waiting = iter(())  # a failure leaves nothing more to do, and a helper that comes late finds nothing
                turn.wait_for(lambda: not helping)
            break
        except BaseException as failure:  # an interrupt: it waits until nobody writes to the result any more
            failures.append(failure)
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # they refer to this frame, and it to them
    return results


_pools: dict[int, Any] = {}


def _start(helper: Callable[[], None], count: int, most: int) -> None:
    """Begin it in so many other threads, or fewer; `most` of them wait from one call to the next."""
    try:
        from concurrent.futures import ThreadPoolExecutor

        if most not in _pools:
            _pools.setdefault(most, ThreadPoolExecutor(most, thread_name_prefix="anynorm"))
        for _ in range(count):
            _pools[most].submit(helper)
    except RuntimeError:  # no thread can be started, or Python shuts down
        return


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)
