"""How much memory a process held at most (Linux). As a script: one that imports modules, in order."""

from __future__ import annotations

import importlib
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

    command = [sys.executable, __file__, "numpy"]
    return int(subprocess.run(command, check=True, capture_output=True).stdout.split()[0])


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
        print(peak_memory(), "bytes after", module)
