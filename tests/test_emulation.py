"""The emulation of a GPU: it computes what the PTX ISA says, and catches the faults that it is there for."""

import subprocess
import sys

import emulated
import ml_dtypes
import numpy as np
import pytest
from calls import environment

from dcn_np.cuda.launching import ARGUMENTS_DTYPE

FAULTS = emulated.EMULATION / "faults.cu"
ORDERS = (0, 1, 2, 3)
THREADS = 64


def launch(
    kernel, given, results, *, fault=False, threads=THREADS, order=0, shared=2 * 16 * THREADS, count=0
):
    """Run one block; return `results`, an array of zeros until then."""
    record = np.zeros(1, ARGUMENTS_DTYPE)
    record["x"]["data"], record["between"], record["count"] = given.ctypes.data, results.ctypes.data, count
    module = emulated.compiled(FAULTS, {"FAULT": "1"} if fault else {})
    module.launch(kernel, (1, 1, 1), (threads, 1, 1), shared, record, order=order)
    return results


def outcomes(kernel, *, fault):
    given = np.random.default_rng(3).standard_normal(4 * THREADS).astype(np.float32)
    return [
        launch(kernel, given, np.zeros(THREADS, np.float32), fault=fault, order=order).tobytes()
        for order in ORDERS
    ]


SHOWN_BY_ORDER = ["missing_barrier", "reused_buffer", "unordered_sum"]
SHOWN_BY_POISON = ["missing_barrier", "uninitialised", "missing_wait", "short_wait"]


@pytest.mark.parametrize("kernel", [*SHOWN_BY_ORDER, *SHOWN_BY_POISON[1:], "divergent_barrier"])
def test_the_right_kernel_is_right_in_every_order(kernel):
    results = outcomes(kernel, fault=False)
    assert len(set(results)) == 1
    assert np.isfinite(np.frombuffer(results[0], np.float32)).all()


@pytest.mark.parametrize("kernel", SHOWN_BY_ORDER)
def test_a_race_shows_in_the_order_of_threads(kernel):
    assert len(set(outcomes(kernel, fault=True))) > 1


@pytest.mark.parametrize("kernel", SHOWN_BY_POISON)
def test_what_is_read_too_early_is_nan(kernel):
    assert any(np.isnan(np.frombuffer(result, np.float32)).any() for result in outcomes(kernel, fault=True))


def test_a_divergent_barrier_is_an_error():
    with pytest.raises(emulated.EmulationError, match=r"divergent_barrier: .*barrier"):
        outcomes("divergent_barrier", fault=True)


SANITIZED = """
import sys
import emulated
import numpy as np
import test_emulation
path, kernel = emulated.library(emulated.EMULATION / "faults.cu", {defines!r}, sanitize=True), {kernel!r}
emulated.compiled = lambda source, defines: emulated.EmulatedModule(path)
given = np.zeros({threads}, np.float32)
test_emulation.launch(kernel, given, np.zeros({threads}, np.float32), shared=4 * {threads})
print("right")
"""


def sanitized(kernel, *, fault):
    """Run a kernel under AddressSanitizer, in a process of its own."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    variables = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
    }
    code = SANITIZED.format(defines={"FAULT": "1"} if fault else {}, kernel=kernel, threads=THREADS)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("kernel", ["shared_out_of_bounds", "global_out_of_bounds"])
def test_a_read_out_of_bounds_is_found_by_the_sanitizer(kernel):
    right, wrong = sanitized(kernel, fault=False), sanitized(kernel, fault=True)
    assert (right.returncode, right.stdout.strip()) == (0, "right"), right.stderr
    assert wrong.returncode != 0
    assert "heap-buffer-overflow" in wrong.stderr


def test_matrices_are_laid_out_as_the_ptx_isa_says():
    given = np.arange(256, dtype=np.uint16)
    got = (
        launch("matrices", given, np.zeros((32, 8), np.uint32), threads=32)
        .view(np.uint16)
        .reshape(32, 2, 4, 2)
    )
    wanted = given.reshape(4, 8, 8)
    for lane in range(32):
        row, pair = lane // 4, slice(2 * (lane % 4), 2 * (lane % 4) + 2)
        assert np.array_equal(got[lane, 0], wanted[:, row, pair])
        assert np.array_equal(got[lane, 1], wanted[:, pair, row])
    wrong = launch("matrices", given, np.zeros((32, 8), np.uint32), threads=32, fault=True)
    assert not np.array_equal(wrong.view(np.uint16).reshape(32, 2, 4, 2), got)


def registers(matrix, row_of, column_of, count):
    """(registers, lanes) of 32 bits from a matrix, by the position of each register's first number."""
    packed = 4 // matrix.itemsize
    rows = [
        np.ascontiguousarray(
            [[matrix[row_of(lane, r), column_of(lane, r) + i] for i in range(packed)] for lane in range(32)]
        )
        for r in range(count)
    ]
    return np.stack([row.view(np.uint32).reshape(32) for row in rows])


@pytest.mark.parametrize("kernel", ["product_f16", "product_bf16", "product_tf32"])
def test_products_are_laid_out_as_the_ptx_isa_says(kernel):
    dtype = {"product_f16": np.float16, "product_bf16": ml_dtypes.bfloat16, "product_tf32": np.float32}[
        kernel
    ]
    depth, rng = (8 if dtype is np.float32 else 16), np.random.default_rng(5)
    # Few bits: the sums are exact.
    a = rng.integers(-8, 8, (16, depth)).astype(dtype)
    b = rng.integers(-8, 8, (depth, 8)).astype(dtype)
    packed, half = depth // 8, depth // 2
    left = registers(
        a, lambda lane, r: lane // 4 + r % 2 * 8, lambda lane, r: lane % 4 * packed + r // 2 * half, 4
    )
    right = registers(
        np.ascontiguousarray(b.T), lambda lane, r: lane // 4, lambda lane, r: lane % 4 * packed + r * half, 2
    )
    got = launch(kernel, np.concatenate([left, right]), np.zeros((4, 32), np.float32), threads=32)
    wanted = a.astype(np.float32) @ b.astype(np.float32)
    for lane in range(32):
        for i in range(4):
            assert got[i, lane] == wanted[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]


def test_shuffles():
    given = np.random.default_rng(6).standard_normal(32)
    got = launch("shuffles", given, np.zeros((2, 32)), threads=32)
    assert np.array_equal(got[0], np.full(32, given[5]))
    assert np.array_equal(got[1], given[np.arange(32) ^ 6])


def test_conversions_round_to_nearest_even():
    rng = np.random.default_rng(7)
    every = np.arange(65536, dtype=np.uint16)
    exact = [every.view(np.float16).astype(np.float32), every.view(ml_dtypes.bfloat16).astype(np.float32)]
    ties = [
        ((value.view(np.uint32).astype(np.uint64) + step).astype(np.uint32)).view(np.float32)
        for value, step in ((exact[0], 0x1000), (exact[1], 0x8000))
    ]
    drawn = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([*exact, *ties, drawn])
    got = launch("conversions", values, np.zeros((values.size, 3), np.uint32), threads=32, count=values.size)
    nan = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        for column, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16)):
            low, high = got[:, column].copy().view(np.uint16).reshape(-1, 2).T
            assert np.array_equal(low[~nan], values.astype(dtype).view(np.uint16)[~nan])
            assert np.array_equal(low, high)
            assert np.isnan(low[nan].view(dtype).astype(np.float32)).all()
        rounded = got[:, 2].copy().view(np.float32)
        finite = np.isfinite(values) & np.isfinite(rounded)
        units = np.abs(rounded[finite].astype(np.float64) - values[finite])
        normal = np.abs(values[finite]) >= np.finfo(np.float32).tiny
        assert (units[normal] <= np.abs(values[finite])[normal].astype(np.float64) * 2.0**-11).all()
        assert not (got[:, 2][~nan] & 0x1FFF).any()
