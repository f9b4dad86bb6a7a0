"""Does benchmarks/regions.py time right results only?"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy
import pytest

from dcn_np.commands import bench_timing
from dcn_np.commands.bench_problems import WrongResultError
from dcn_np.commands.bench_timing import Case

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

goals = importlib.import_module("goals")
regions = importlib.import_module("regions")
peers = importlib.import_module("peers.regions")

SMALL = [
    dataclasses.replace(
        problem, regions=45, channels=max(4, 2 * problem.group**2), outputs=2 if problem.group > 1 else 4
    )
    for problem in regions.PROBLEMS.values()
]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Times do not matter here."""
    monkeypatch.setattr(bench_timing, "FIRST_SETTLE_SECONDS", 0.0)


def results(problem, data):
    work = peers.DcnNp().prepare(problem, data, "both", 1)
    return work.results(work.run())


@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_right_results_pass_and_wrong_ones_are_refused(problem):
    data = regions.RegionData.of(problem)
    expected, right = regions.Expected(problem, data), results(problem, data)
    assert max(expected.residuals(right, "both").values()) < 1e-5
    for name, result in right.items():
        if result is not None:
            for wrong in (result * numpy.float32(1.001), numpy.full_like(result, numpy.nan)):
                with pytest.raises(WrongResultError, match=name):
                    expected.residuals(right | {name: wrong}, "both")
    with pytest.raises(WrongResultError, match="no result y"):
        expected.residuals({}, "forward")


def test_regions_lie_inside_the_map():
    problem = regions.PROBLEMS["R1"]
    rois = regions.RegionData.of(problem).rois
    assert rois.shape == (512, 5)
    assert rois[:, 1:3].min() >= 0
    assert (rois[:, 3:] > rois[:, 1:3]).all()
    assert rois[:, 3].max() <= 84 * 16
    assert rois[:, 4].max() <= 50 * 16


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("problem", SMALL, ids=lambda problem: problem.name)
def test_installed_peers_agree(name, problem):
    found, missing = peers.load([name])
    if missing:
        pytest.skip(missing[name])
    expected = regions.Expected(problem, regions.RegionData.of(problem))
    for passes in ("forward", "both"):
        for case in regions.time_problems([expected], passes, found, [1], 1):
            assert case.refused is None


def test_the_script_times_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regions, "PROBLEMS", {problem.name: problem for problem in SMALL})
    file = tmp_path / "times.json"
    words = ["--peers", "none", "--rounds", "1", "--threads", "1", "--json", str(file)]
    assert regions.main(words) == 0
    assert "deform_psroi_pool" in capsys.readouterr().out
    records = json.loads(file.read_text())["results"]
    assert [record["shape"] for record in records] == 2 * ["R1", "R2", "R3", "R4"]
    assert [record["passes"] for record in records] == 4 * ["forward"] + 4 * ["both"]


def case(shape, passes, name, seconds, threads=1):
    problem = regions.PROBLEMS[shape]
    implementation = type("Named", (), {"name": name})()
    return Case(implementation, problem, passes, "float32", threads, seconds=[seconds] * 3)


def test_goals():
    cases = [
        case("R1", "forward", "dcn_np", 0.010),
        case("R1", "forward", "onnxruntime", 0.040),
        case("R2", "forward", "dcn_np", 0.015),
        case("R1", "forward", "dcn_np", 0.005, 2),
    ]
    rows = {row.title: row for row in goals.region_rows(cases) if row.met is not None}
    assert rows["forward, 1 thread: faster than onnxruntime"].reached == pytest.approx(4)
    assert rows["forward, 1 thread: faster than onnxruntime"].met
    assert not rows["forward, 1 thread: to roi_align"].met
    assert rows["forward: gain of the second thread"].reached == pytest.approx(2)
    assert len(rows) == 3
