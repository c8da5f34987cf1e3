"""Bounds on what files of somebody else can make this process do: time, memory, size.

The limits are far above what honest files need; SECURITY.md lists them. Memory is bounded on Linux only, where a limit
on the address space can be set for a while.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
MIB, GIB = 1 << 20, 1 << 30
GRACE = 1.0  # seconds that an interrupted thread gets to end


class LimitExceeded(Exception):
    """A bound was reached, or the code behind it failed in a way that is no Python exception of its own."""


def within(function: Callable[[], T], *, seconds: float, memory: int | None = None) -> T:
    """The result of a function that handles what is not trusted, run in a thread of its own.

    A thread, because native code (a tokenizer's regular expressions) cannot be interrupted, but it can be left behind.

    Args:
        function: what to call.
        seconds: how long it may take.
        memory: bytes by which the process may grow meanwhile.

    Raises:
        LimitExceeded: it took longer, needed more, or panicked in Rust; whatever else it raises, it raises here.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    with bounded_memory(memory):
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            _interrupt(thread)
            raise LimitExceeded(f"it takes longer than {seconds:,.0f} s")
    if results:
        return results[0]
    error = errors[0]
    if isinstance(error, MemoryError):
        raise LimitExceeded(_too_much(memory)) from None
    if isinstance(error, Exception):
        raise error
    raise LimitExceeded(f"{type(error).__name__}: {error}") from None  # of pyo3, which derives from BaseException


def _interrupt(thread: threading.Thread) -> None:
    """Have a thread end as soon as it runs Python code again."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        thread.join(GRACE)


@contextmanager
def bounded_memory(extra: int | None) -> Iterator[None]:
    """Let allocations fail with MemoryError that would have the process grow by more than `extra` bytes."""
    if extra is None or sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    wanted = pages * resource.getpagesize() + extra
    if resource.RLIM_INFINITY != soft <= wanted or resource.RLIM_INFINITY != hard < wanted:  # it is bounded already
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def each_within(items: Iterable[T], memory: int) -> Iterator[T]:
    """The items; to make one, the process may grow by `memory` bytes. Raises LimitExceeded beyond that."""
    iterator = iter(items)
    while True:
        try:
            with bounded_memory(memory):
                item = next(iterator)
        except StopIteration:
            return
        except MemoryError:
            raise LimitExceeded(_too_much(memory)) from None
        yield item


def _too_much(memory: int | None) -> str:
    return f"it needs more than {memory / GIB:,.1f} GiB of memory" if memory else "there is not enough memory"
