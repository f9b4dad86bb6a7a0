"""Planted faults for the sanitizer build.

usage: canaries.py build FOLDER | list | run FOLDER FAULT | instrumented FOLDER
"""

import ctypes
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tools" / "canaries.cpp"


def library(folder):
    return Path(folder, "libcanaries.so").resolve()


def build(folder):
    """Compile the faults with the flags that the engine is compiled with."""
    flags, link_flags = runpy.run_path(str(ROOT / "setup.py"))["build_flags"]()
    command = [os.environ.get("CXX", "g++"), *flags, "-fvisibility=default", "-shared", str(SOURCE)]
    subprocess.run([*command, *link_flags, "-o", library(folder)], check=True)


def names():
    return re.findall(r"^int (\w+)\(", SOURCE.read_text(), re.MULTILINE)


def run(folder, fault):
    ctypes.CDLL(str(library(folder)))[fault](4)


def instrumented(folder):
    """Fail unless the module that the tests are about to import is the sanitized one."""
    from dcn_np.cpu import _native

    file = Path(_native.__file__).resolve()
    symbols = subprocess.run(["nm", "-D", file], check=True, capture_output=True, text=True).stdout
    if Path(folder).resolve() not in file.parents or "__asan_report" not in symbols:
        sys.exit(f"{file} is not the sanitized build in {folder}")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "list":
        print(*names())
    else:
        {"build": build, "run": run, "instrumented": instrumented}[command](*arguments)
