"""Does benchmarks/footprint.py measure what runs, and say what does not?"""

import importlib
import re
import sys
from pathlib import Path

import pytest

from dcn_np.commands import demo_digits

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir() or not demo_digits.is_here():
    pytest.skip("the benchmarks or the examples are not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

footprint = importlib.import_module("footprint")
models = importlib.import_module("footprint_models")


def table(capsys):
    """The cells of each row by the package."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].split()[0]: row for row in rows}


@pytest.fixture
def only(monkeypatch):
    """Measure some packages alone."""

    def choose(*names):
        monkeypatch.setattr(footprint, "RUNS", {name: footprint.RUNS[name] for name in names})

    return choose


def test_a_row_for_each_package_installed_or_not(capsys):
    assert footprint.main(["--rounds", "1", "--threads", "1"]) == 0
    rows = table(capsys)
    assert list(rows) == list(footprint.RUNS)
    for name, row in rows.items():
        absent = footprint.problem(name)
        assert (row[1] == absent) if absent else all(float(cell) >= 0 for cell in row[1:])
    numpys, ours = ([float(cell) for cell in rows[name][1:]] for name in ("numpy", "dcn_np"))
    assert numpys[0] < ours[0] < 200  # MB
    assert numpys[2] < ours[2] <= ours[3] < 300  # MiB


def test_a_package_that_is_not_there_is_listed(monkeypatch, capsys, only):
    only("numpy", "dcn_np", "onnxruntime", "openvino", "torch")
    monkeypatch.setattr(footprint, "is_there", lambda module: module in ("numpy", "dcn_np", "onnxruntime"))
    assert footprint.main(["--rounds", "1", "--threads", "1"]) == 0
    reasons = {name: row[1] for name, row in table(capsys).items() if row[2] == "–"}
    assert reasons == {
        "onnxruntime": "absent: onnx",
        "openvino": "absent: openvino",
        "torch": "absent: torch",
    }


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_another_answer_is_noticed(package, monkeypatch, capsys, only):
    if footprint.problem(package):
        pytest.skip(footprint.problem(package))
    only("dcn_np", package)
    monkeypatch.setattr(models, "MASK_FACTOR", 1.9)
    assert footprint.main(["--rounds", "1", "--threads", "1"]) == 1
    assert re.fullmatch(r"WRONG: logits differ by \S+ from dcn_np's", table(capsys)[package][1])


def test_a_run_that_fails_is_noticed(monkeypatch, capsys, only, tmp_path):
    only("numpy", "dcn_np")
    right = footprint.once

    def once(package, folder, threads):
        return right(package, tmp_path if package == "numpy" else folder, threads)

    monkeypatch.setattr(footprint, "once", once)
    assert footprint.main(["--rounds", "1"]) == 1
    assert "failed: FileNotFoundError" in table(capsys)["numpy"][1]


def test_what_a_package_requires_is_counted():
    found = footprint.required(["pytest"])
    assert {"pytest", "pluggy", "iniconfig", "packaging"} <= found
    assert "argcomplete" not in found  # of an extra
    assert footprint.required(["dcn_np"]) == {"dcn_np", "numpy"}
    sizes = [footprint.distribution_bytes(name) for name in found]
    assert all(size > 10_000 for size in sizes)
    assert footprint.installed_bytes(["pytest"]) == sum(sizes)


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_none_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        footprint.main([option, "0"])
    assert f"{option} is 0; wanted at least 1" in capsys.readouterr().err
