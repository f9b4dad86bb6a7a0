"""What the tests on a GPU share: where they run, and what they leave behind under benchmarks/results/.

See hardware.py for when these tests run.
"""

import collections
import datetime
import json
import platform
import re
from pathlib import Path

import emulated_gpu
import numpy as np
import pytest
from hardware import EMULATED

import dcn_np
from dcn_np.commands import machine

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def gpu():
    """The four functions for NumPy's arrays, computed on the GPU."""
    if EMULATED:
        with emulated_gpu.emulated_gpu():
            yield emulated_gpu
        return
    import cupy

    def to_gpu(array):
        # cupy.asarray makes C order of what it copies; the memory order is part of what is tested.
        order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        back = [order.index(axis) for axis in range(array.ndim)]
        return cupy.asarray(np.ascontiguousarray(array.transpose(order))).transpose(back)

    yield emulated_gpu.through(to_gpu, cupy.asnumpy)


@pytest.fixture(scope="session")
def cupy():
    """CuPy; where there is only the emulation the test is skipped."""
    if EMULATED:
        pytest.skip("for a GPU")
    import cupy

    return cupy


# ---- the record


outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
measured: dict[str, object] = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid.split("::")[1].split("[")[0]][report.outcome] += 1


@pytest.fixture(scope="session")
def record():
    """Where a test notes what it measured, by name."""
    return measured


def pytest_sessionfinish(session, exitstatus):
    if EMULATED or not outcomes:
        return
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = {
        "command": "make test-gpu",
        "date": today,
        **machine.gpu(),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "versions": {"dcn_np": dcn_np.__version__, "numpy": np.__version__, **machine.optional_packages()},
        "nvrtc": machine.nvrtc()["version"],
        "exit status": int(exitstatus),
        "tests": {name: dict(counts) for name, counts in sorted(outcomes.items())},
        "measured": measured,
    }
    name = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"test-gpu-{name}-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {path.relative_to(ROOT)}")
