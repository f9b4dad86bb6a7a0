"""How many threads a call may use: what was set, and never more than the surroundings allow."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from .cgroup import cpu_quota
from .messages import number, shown

_process: int | None = None
_context: ContextVar[int | None] = ContextVar("dcn_np_num_threads", default=None)
_exact: ContextVar[int | None] = ContextVar("dcn_np_exact_threads", default=None)


def set_num_threads(n: int | None) -> None:
    """Limit the threads of every call in this process.

    Parameters
    ----------
    n : int or None
        At least 1; None takes the limit away. Results do not depend on it, bit for bit.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or less than 1.

    See Also
    --------
    num_threads : The same for a block of code.
    """
    global _process
    _process = None if n is None else _checked(n)
    share_process_limit()


def share_process_limit() -> None:
    """Tell the engine the limit of the process, for calls that do not come from Python."""
    from .cpu import _native

    _native.limit_process_threads(min(_process_wanted() or 2**16, cgroup_cpus() or 2**16))


def get_num_threads() -> int:
    """Return the number of threads a call made here and now may use.

    Returns
    -------
    int
        The least of: `num_threads` or `set_num_threads` or ``DCN_NP_NUM_THREADS`` (the first that is set),
        what OpenMP would start (``OMP_NUM_THREADS``, threadpoolctl), the affinity mask, the CPU quota of the
        cgroup.
    """
    exact = _exact.get()
    if exact is not None:
        return exact
    most = available()
    return max(1, min(_wanted() or most, most))


@contextmanager
def num_threads(n: int | None) -> Iterator[None]:
    """Limit the threads of the calls inside a ``with`` block, in this thread or task only.

    Parameters
    ----------
    n : int or None
        At least 1; None lifts an outer `num_threads`.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or less than 1.

    See Also
    --------
    set_num_threads : The same for the process.
    """
    token = _context.set(None if n is None else _checked(n))
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def exactly(n: int) -> Iterator[None]:
    """Ask for n threads whatever the machine has: for tests of what must not depend on their number."""
    token = _exact.set(_checked(n))
    try:
        yield
    finally:
        _exact.reset(token)


def available() -> int:
    """Return how many threads the surroundings allow: OpenMP, affinity mask, cgroup quota."""
    most: int = _native().openmp_threads()
    return min(most, cgroup_cpus() or 2**31)


def environment_limit() -> int | None:
    """Return DCN_NP_NUM_THREADS; a value that is not a positive integer is refused, not ignored."""
    return _parsed(os.environ.get("DCN_NP_NUM_THREADS"))


@lru_cache(maxsize=1)
def _native() -> Any:
    """Import late what imports this module, and once: an import statement takes half a microsecond."""
    from .cpu import _native

    return _native


@lru_cache(maxsize=1)
def cgroup_cpus() -> int | None:
    """Return the CPU quota of this process's control groups in whole CPUs, at least 1; None without one."""
    quota = cpu_quota()
    return None if quota is None else max(1, int(quota))


def _wanted() -> int | None:
    limit = _context.get()
    return _process_wanted() if limit is None else limit


def _process_wanted() -> int | None:
    return environment_limit() if _process is None else _process


@lru_cache(maxsize=4)
def _parsed(text: str | None) -> int | None:
    if not text:
        return None
    try:
        return _checked(int(text))
    except ValueError:
        raise ValueError(f"DCN_NP_NUM_THREADS is {text!r}; wanted an integer of at least 1") from None


def _checked(n: int) -> int:
    if isinstance(n, bool):
        raise TypeError(f"the number of threads is {n}; wanted an integer")
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of threads is {shown(n)}; wanted an integer") from None
    if n < 1:
        raise ValueError(f"the number of threads is {number(n)}; wanted at least 1")
    return min(n, 2**16)
