"""How much memory a process held at most (Linux). As a script: one that imports NumPy and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the most bytes that this process held so far, its libraries included.

    Not getrusage's ru_maxrss: it begins with what the process held that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def memory_of_numpy() -> int:
    """Return the peak of a process that imports NumPy and does nothing else."""
    import subprocess  # what measures is no part of the process that is measured

    return int(subprocess.run([sys.executable, __file__], check=True, capture_output=True).stdout)


if __name__ == "__main__":
    import numpy  # noqa: F401  # what it takes is the question

    print(peak_memory())
