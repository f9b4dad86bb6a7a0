"""Calls for the tests of the process around them, and a way to make them in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import dcn_np

# What a process of its own imports from: this folder, and the very package that this process tests.
IMPORTED_FROM = [str(Path(__file__).parent), str(Path(dcn_np.__file__).parent.parent)]
OUR_VARIABLES = {"DCN_NP_ISA", "DCN_NP_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT"}

PRELUDE = """
import os, sys, threading, time
import numpy as np
import dcn_np
from calls import *
from dcn_np import threads
"""


def problem(batch=1, channels=16, size=24, kernel=3, dtype=np.float32, seed=0):
    """Return x, offset, mask and weight; the default is just large enough to be given to several threads."""
    rng = np.random.default_rng(seed)
    taps, out = kernel * kernel, size - kernel + 1
    return (
        rng.standard_normal((batch, channels, size, size)).astype(dtype),
        rng.standard_normal((batch, 2 * taps, out, out)).astype(dtype),
        rng.random((batch, taps, out, out)).astype(dtype),
        rng.standard_normal((channels, channels, kernel, kernel)).astype(dtype),
    )


def both(arrays):
    """Call forward and backward; return the output and the five gradients."""
    y = dcn_np.modulated_deform_conv(*arrays)
    return [y, *dcn_np.modulated_deform_conv_backward(y, *arrays)]


def same(some, others):
    """Tell whether all arrays are equal, bit for bit where they are finite."""
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def tasks():
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def mapped_and_resident():
    """Return the bytes of address space and of memory that this process has."""
    pages = Path("/proc/self/statm").read_text().split()[:2]
    return tuple(int(number) * os.sysconf("SC_PAGESIZE") for number in pages)


def environment(**more):
    """Return this process's environment, without limits on threads and with the folders to import from."""
    kept = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
    path = os.pathsep.join([*IMPORTED_FROM, kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return kept | {"PYTHONPATH": path} | more


def python(code, *arguments, timeout=60, **variables):
    """Run code in a process of its own and return what it printed; any end but a clean one is a failure."""
    # Python 3.12 warns at every fork of a process with threads: what these tests are about.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", code]
    done = subprocess.run(
        command + [str(argument) for argument in arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout.strip()


def python_with_calls(code, *arguments, **options):
    """Run code as `python` does, after the imports that most of it needs."""
    return python(PRELUDE + code, *arguments, **options)
