"""The inner loops for aarch64, read from the assembly: sums in registers, nothing spilled, nothing called."""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = runpy.run_path(str(ROOT / "setup.py"))

# Of the product: vector instructions, loads included, for each multiply-add of a vector.
MOST_FOR_A_MULTIPLY_ADD = {"f": 1.15, "d": 1.25}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """Map mangled names to the lines of the functions."""
    file = tmp_path_factory.mktemp("assembly") / "baseline.s"
    compiler = shlex.split(os.environ["DCN_NP_TEST_AARCH64"])
    flags, _ = BUILD["build_flags"]()
    flags += BUILD["INSTRUCTION_SETS"]["aarch64"]["baseline"]
    flags += [f"-I{folder}" for folder in BUILD["INCLUDE_DIRS"]]
    subprocess.run([*compiler, *flags, "-S", "-o", file, "src/isa/baseline.cpp"], check=True, cwd=ROOT)
    found = re.finditer(r"^(_Z\w+):\n(.*?)^\t\.size\t\1", file.read_text(), re.DOTALL | re.MULTILINE)
    return {match[1]: match[2].splitlines() for match in found}


def inner_loops(lines):
    """List the loops without a loop or a branch inside: the lines of each."""
    labels = {line[:-1]: index for index, line in enumerate(lines) if re.fullmatch(r"\.L\d+:", line)}
    loops = []
    for index, line in enumerate(lines):
        target = re.match(r"\tc?b\S*\t.*?(\.L\d+)$", line)
        if target and labels.get(target[1], index) < index:
            body = [text for text in lines[labels[target[1]] + 1 : index] if not text.startswith("#")]
            if not any(re.match(r"(\t(c?b|tb|ret)|\.L)", text) for text in body):
                loops.append(body)
    return loops


def matching(functions, pattern):
    return [lines for name, lines in functions.items() if re.search(pattern, name)]


def with_multiply_adds(loops, least):
    """Return the loops that multiply and add vectors at least so many times."""
    return [body for body in loops if sum("\tfmla\t" in line for line in body) >= least]


def of_vectors(body):
    return [line for line in body if re.match(r"\s+(?!prfm)\w+\s.*\b[vqds]\d+\b", line)]


def assert_in_registers(body):
    assert not [line for line in body if "[sp" in line], "spilled"
    assert not [line for line in body if re.match(r"\tblr?\t", line)], "calls"


@pytest.mark.parametrize("number", ["f", "d"])
def test_the_product_multiplies_in_registers(functions, number):
    lanes = {"f": 4, "d": 2}[number]
    (tile,) = matching(functions, rf"multiply_tileI{number}Li{lanes}ELi2ELi6E")
    (body,) = with_multiply_adds(inner_loops(tile), 24 * lanes)
    assert_in_registers(body)
    multiply_adds = [line for line in body if "\tfmla\t" in line]
    assert len(multiply_adds) == 6 * 2 * 2 * lanes  # rows, vectors of columns, terms
    assert len(of_vectors(body)) <= MOST_FOR_A_MULTIPLY_ADD[number] * len(multiply_adds)


@pytest.mark.parametrize("number", ["f", "d"])
def test_samples_are_gathered_in_registers(functions, number):
    # For results, and for the gradients of weights.
    gathers = matching(functions, rf"gather_(taps|columns)I{number}Li2E")
    assert len(gathers) == 2
    for lines in gathers:
        loops = with_multiply_adds(inner_loops(lines), 3)
        assert loops
        for body in loops:
            assert_in_registers(body)
