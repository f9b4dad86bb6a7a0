"""Do the benchmarks time right results only, and write what compare.py reads?"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

import dcn_np
from dcn_np import reference
from dcn_np.commands import bench, bench_timing, machine
from dcn_np.commands.bench_problems import PROBLEMS, Data, Expected, Problem, WrongResultError
from dcn_np.commands.bench_timing import Case, Work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

compare = importlib.import_module("compare")
goals = importlib.import_module("goals")
memory = importlib.import_module("memory")
overhead = importlib.import_module("overhead")
peers = importlib.import_module("peers")
run = importlib.import_module("run")

TINY = Problem("tiny", "2-D, everything at once", 2, 4, 6, (9, 11), stride=2, groups=2, offset_groups=2)
VARIETY = (
    TINY,
    Problem("line", "1-D, more outputs than are sampled", 1, 3, 2, (40,), (5,), padding=2),
    Problem("volume", "3-D", 1, 2, 3, (3, 4, 5), (3, 1, 2)),
    Problem("dilated", "rectangular", 3, 2, 2, (12, 30), (3, 2), dilation=2),
)
NAMES = ("y", "x", "offset", "mask", "weight", "bias")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Times do not matter here."""
    monkeypatch.setattr(bench_timing, "FIRST_SETTLE_SECONDS", 0.0)


def results_of_reference(problem, data):
    gradients = reference.modulated_deform_conv_backward(
        data.grad_output, *data.arguments[:4], **problem.parameters
    )
    return {
        "y": reference.modulated_deform_conv(*data.arguments, **problem.parameters),
        **gradients._asdict(),
    }


class Reference:
    """An implementation that is right, or wrong in one result by a factor."""

    version = "1"
    deforms = True

    def __init__(self, name="reference", wrong=None, factor=1.001):
        self.name, self.wrong, self.factor = name, wrong, factor

    def prepare(self, problem, data, passes, threads):
        def compute():
            results = results_of_reference(problem, data)
            if self.wrong:
                results[self.wrong] = results[self.wrong] * results[self.wrong].dtype.type(self.factor)
            return results

        return Work(compute, dict)


@pytest.mark.parametrize("problem", VARIETY, ids=lambda problem: problem.name)
def test_right_results_pass(problem):
    data = Data.of(problem, numpy.float64)
    residuals = Expected(problem, data).residuals(results_of_reference(problem, data), "both")
    assert set(residuals) == set(NAMES)
    assert max(residuals.values()) < 1e-14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoil", [lambda a: a * a.dtype.type(1.001), lambda a: a * a.dtype.type(math.nan)])
def test_wrong_results_are_refused(name, spoil):
    data = Data.of(TINY)
    results = results_of_reference(TINY, data)
    results[name] = spoil(results[name])
    with pytest.raises(WrongResultError, match=rf"^{name}: residual"):
        Expected(TINY, data).residuals(results, "both")


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (-1, -1, -1, -1)])
def test_one_wrong_value_at_the_ends_is_seen(index):
    problem = PROBLEMS["S9"]
    data = Data.of(problem)
    results = results_of_reference(problem, data)
    results["y"][index] += 1
    with pytest.raises(WrongResultError, match=r"^y:"):
        Expected(problem, data).residuals(results, "forward")


def test_other_shapes_dtypes_and_nothing_are_refused():
    data = Data.of(TINY)
    expected, y = Expected(TINY, data), results_of_reference(TINY, data)["y"]
    for results in ({"y": y[:1]}, {"y": y.astype(numpy.float64)}, {}):
        with pytest.raises(WrongResultError):
            expected.residuals(results, "forward")


def test_data_are_the_same_in_every_run_and_dtype():
    single, again, double = Data.of(TINY), Data.of(TINY), Data.of(TINY, numpy.float64)
    for field in dataclasses.fields(Data):
        one, two, wide = (getattr(data, field.name) for data in (single, again, double))
        numpy.testing.assert_array_equal(one, two)
        numpy.testing.assert_allclose(one, wide, rtol=1e-6)
        assert (one.dtype, wide.dtype) == (numpy.float32, numpy.float64)


def test_offsets_spread_over_two_pixels_and_keep_off_the_lattice():
    offset = Data.of(PROBLEMS["S9"]).offset
    assert offset.std() == pytest.approx(2, rel=0.05)
    assert not (offset == numpy.round(offset)).any()


def test_shapes_have_the_outputs_of_their_layers():
    assert list(PROBLEMS) == [f"S{number}" for number in range(1, 13)]
    assert {name: problem.output for name, problem in PROBLEMS.items()} == {
        name: (56, 56) if name == "S8" else problem.input for name, problem in PROBLEMS.items()
    }
    assert PROBLEMS["S1"].multiplications == 64 * 64 * 9 * 56 * 56
    assert PROBLEMS["S7"].shapes["weight"] == (256, 8, 3, 3)
    assert PROBLEMS["S11"].shapes["offset"] == (1, 81, 16, 56, 56)


@pytest.mark.parametrize("passes", bench.PASSES)
@pytest.mark.parametrize("problem", VARIETY, ids=lambda problem: problem.name)
def test_the_library_is_right_and_timed(problem, passes):
    cases = bench_timing.time_problem(problem, passes, [bench.DcnNp()], bench.DTYPES, [1], rounds=2)
    assert [case.dtype for case in cases] == list(bench.DTYPES)
    for case in cases:
        assert case.refused is None
        assert len(case.seconds) == 2
        assert min(case.seconds) > 0
        assert set(case.residuals) == (set(NAMES) if passes == "both" else {"y"})


def test_a_wrong_implementation_has_no_time():
    implementations = [Reference(), Reference("liar", wrong="offset")]
    right, wrong = bench_timing.time_problem(TINY, "both", implementations, rounds=1)
    assert right.refused is None
    assert len(right.seconds) == 1
    assert wrong.refused.startswith("offset: residual")
    assert wrong.seconds == []
    last = bench.table([right, wrong]).splitlines()[-1]
    assert "liar" in last
    assert "refused: offset" in last


def test_an_ordinary_convolution_is_compared_with_the_rigid_grid():
    class Ordinary(Reference):
        deforms = False

        def prepare(self, problem, data, passes, threads):
            y = reference.modulated_deform_conv(data.x, None, None, data.weight, data.bias, **parameters)
            return Work(lambda: {"y": y}, dict)

    parameters = TINY.parameters
    ordinary, deformed = bench_timing.time_problem(TINY, "forward", [Ordinary(), Reference()], rounds=1)
    assert ordinary.refused is None
    assert deformed.refused is None


def test_every_case_runs_in_every_round_in_changing_order():
    order = []
    cases = []
    for number in range(6):
        work = Work(lambda number=number: order.append(number), dict)
        cases.append((Case(Reference(), TINY, "forward", "float32", 1), work))
    bench_timing.interleave(cases, rounds=8, settle=0)
    rounds = [order[start : start + 6] for start in range(0, 48, 6)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(len(case.seconds) == 8 for case, _ in cases)


def test_ratios_are_taken_inside_the_rounds():
    assert bench_timing.in_round_ratio([2, 20, 6], [1, 10, 6]) == 2
    assert math.isnan(bench_timing.in_round_ratio([], [1.0]))


def test_command_times_and_writes(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    file = tmp_path / "bench.json"
    words = ["--shapes", "S9", "--rounds", "1", "--threads", "1", "--json", str(file)]
    assert bench.main(parser.parse_args(words)) == 0
    assert "S9: 1 x 16 -> 16" in capsys.readouterr().out
    assert [result["passes"] for result in json.loads(file.read_text())["results"]] == ["forward", "both"]


def test_wrong_results_make_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(bench, "own_implementations", lambda isas: [Reference("liar", wrong="y")])
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = ["--shapes", "S9", "--passes", "forward", "--threads", "1", "--rounds", "1"]
    assert bench.main(parser.parse_args(words)) == 1
    assert "1 wrong results were not timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--shapes", "S13"], ["--rounds", "0"], ["--threads", "1,x"], ["--dtype", "int8"], ["--isa", "mmx"]],
)
def test_bad_options_are_refused(words, capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert words[0] in capsys.readouterr().err


def test_more_threads_than_there_are_is_refused():
    with dcn_np.num_threads(1), pytest.raises(SystemExit, match="may use 1"):
        bench.thread_counts(argparse.Namespace(threads=[1, 2]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A file of run.py with both passes of one small shape."""
    folder = tmp_path_factory.mktemp("measured")
    file = folder / "measured.json"
    words = ["--shapes", "S9", "--peers", "none", "--rounds", "2", "--threads", "1", "--json", str(file)]
    assert run.main(words) == 0
    return file


def test_run_writes_what_a_reader_needs(measured):
    record = json.loads(measured.read_text())
    assert record["schema"] == bench.SCHEMA
    wanted = {
        "date",
        "machine",
        "cores",
        "platform",
        "isa",
        "available_isas",
        "versions",
        "commit",
        "missing",
    }
    assert wanted <= set(record)
    assert {"dcn_np", "numpy", "python"} <= set(record["versions"])
    for result in record["results"]:
        assert result["shape"] == "S9"
        assert len(result["seconds"]) == 2
        assert result["median"] == pytest.approx(sum(result["seconds"]) / 2)
        assert 0 < max(result["residuals"].values()) < 1e-4
    small = next(row for row in record["goals"] if row["title"] == "forward, 1 thread: one small call")
    assert small["reached"] == pytest.approx(record["results"][0]["median"] * 1e3)
    assert small["met"] is (small["reached"] <= 0.05)


def test_compare_sets_two_files_side_by_side(measured, tmp_path, capsys):
    capsys.readouterr()
    before = json.loads(measured.read_text())
    twice = before | {"results": [dict(result) for result in before["results"]]}
    twice["results"][0]["median"] *= 2
    del twice["results"][1]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(twice))
    compare.main([str(measured), str(changed)])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("S9 forward float32, 1 thread, dcn_np"))
    assert row.split()[-2:] == ["2.000", "-"]
    assert lines[-1] == "only before: S9 both float32, 1 thread, dcn_np"


def test_compare_refuses_other_files(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"schema": 0, "results": []}))
    with pytest.raises(SystemExit, match="schema"):
        compare.main([str(file), str(file)])


def case_of(name, shape, passes, seconds, threads=1, dtype="float32"):
    return Case(Reference(name), PROBLEMS[shape], passes, dtype, threads, seconds=[seconds] * 3)


def test_goals_are_reached_or_missed():
    cases = [case_of("ordinary", shape, "forward", 1.0) for shape in ("S1", "S2")]
    cases += [case_of("dcn_np", "S1", "forward", 0.8), case_of("dcn_np", "S2", "forward", 1.3)]
    cases += [case_of("dcn_np", "S7", "both", 1.0), case_of("torchvision", "S7", "both", 12.0)]
    cases += [case_of("dcn_np", "S2", "forward", 0.7, threads=2)]
    rows = {(row.title, row.shapes): row for row in goals.rows(cases)}
    mean = rows["forward, 1 thread: to the ordinary convolution, mean", ("S1", "S2")]
    assert mean.reached == pytest.approx(math.sqrt(0.8 * 1.3))
    assert mean.met
    worst = rows["forward, 1 thread: to the ordinary convolution, worst", ("S1", "S2")]
    assert worst.reached == 1.3
    assert not worst.met
    assert "MISSED" in str(worst)
    faster = rows["forward + backward, 1 thread: faster than torchvision", ("S7",)]
    assert faster.reached == 12
    assert faster.met
    second = rows["forward: gain of the second thread", ("S2",)]
    assert second.reached == pytest.approx(1.3 / 0.7)
    assert second.met
    assert rows["forward, 2 threads: to openvino, mean", goals.DENSE].met is None


def test_goals_for_avx2_and_float64_appear_when_measured():
    cases = [case_of("dcn_np-avx512", "S3", "both", 1.0), case_of("dcn_np-avx2", "S3", "both", 1.2)]
    cases += [case_of("dcn_np-avx512", "S3", "both", 2.2, dtype="float64")]
    rows = {row.title: row for row in goals.rows(cases, own="dcn_np-avx512")}
    assert rows["both, threads 1: avx2 to avx512, worst"].reached == pytest.approx(1.2)
    assert not rows["both, threads 1: avx2 to avx512, worst"].met
    assert rows["both, threads 1: float64 to float32, worst"].met


def test_cases_that_scatter_are_named(capsys):
    steady, busy = case_of("dcn_np", "S3", "both", 1.0), case_of("dcn_np", "S4", "both", 1.0)
    busy.seconds[1] = 1.6
    run.print_busy([steady, busy])
    output = capsys.readouterr().out
    assert "S4 both float32 dcn_np, threads 1: spread 1.6" in output
    assert "S3" not in output
    run.print_busy([steady])
    assert capsys.readouterr().out == ""


def test_short_calls_are_repeated_and_long_ones_are_not():
    pauses = iter([0.05, 0.002, 0.05, 0.05, 0.05])
    short = bench_timing.calls_in_a_round(Work(lambda: time.sleep(next(pauses)), dict))
    assert short > 1
    assert bench_timing.calls_in_a_round(Work(lambda: time.sleep(0.03), dict)) == 1


def test_the_commit_is_that_of_the_repository(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *words], check=True)
    assert len(machine.commit()) == 40


def test_a_peer_that_is_not_there_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "peers.onnxruntime_peer", raising=False)
    found, missing = peers.load(["onnxruntime"])
    assert found == []
    assert "ModuleNotFoundError" in missing["onnxruntime"] or "ImportError" in missing["onnxruntime"]


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("problem", VARIETY, ids=lambda problem: problem.name)
def test_installed_peers_agree(name, problem):
    found, missing = peers.load([name])
    if missing:
        pytest.skip(missing[name])
    for passes in bench.PASSES:
        for case in bench_timing.time_problem(problem, passes, found, bench.DTYPES, rounds=1):
            assert case.refused is None


class Hungry(Reference):
    """Needs memory on the way, and returns what it is told to."""

    def prepare(self, problem, data, passes, threads):
        def compute():
            numpy.ones(64 * memory.MIB, numpy.uint8)
            return {"y": numpy.ones(16 * memory.MIB, numpy.uint8)}

        return Work(compute, dict)


class Dying(Reference):
    def prepare(self, problem, data, passes, threads):
        os._exit(1)


class Absent(Reference):
    def prepare(self, problem, data, passes, threads):
        return None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_memory_beyond_the_outputs_is_counted():
    grown = memory.growth(memory.Case(Hungry(), TINY, "forward", "float32", 1))
    # 64 MiB are gone when the 16 MiB of output come.
    assert 44 * memory.MIB < grown < 72 * memory.MIB
    assert math.isnan(memory.growth(memory.Case(Dying(), TINY, "forward", "float32", 1)))
    assert memory.growth(memory.Case(Absent(), TINY, "forward", "float32", 1)) is None


def test_memory_budget_is_that_of_one_image():
    case = memory.Case(Reference(), PROBLEMS["S5"], "forward", "float32", 2)
    image, weights = 256 * 28 * 28, 256 * 256 * 9
    assert case.budget == 4 * (image + weights) + 16 * memory.MIB
    both = dataclasses.replace(case, passes="both")
    assert both.budget == 4 * (3 * image + 2 * weights) + 16 * memory.MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_run_measures_memory(tmp_path, capsys):
    file = tmp_path / "memory.json"
    words = ["--memory", "--shapes", "S9", "--peers", "none", "--threads", "1", "--json", str(file)]
    assert run.main(words) == 0
    records = json.loads(file.read_text())["memory"]
    assert [(record["shape"], record["passes"]) for record in records] == [("S9", "forward"), ("S9", "both")]
    assert all(record["growth"] < record["budget"] for record in records)


@dataclasses.dataclass
class Boxed:
    """An array of another library."""

    array: numpy.ndarray


def boxed_caller(factor=1.0, **fields):
    def convolve(*boxes, **parameters):
        y = dcn_np.modulated_deform_conv(*(box.array for box in boxes), **parameters)
        return Boxed(y * y.dtype.type(factor))

    return overhead.Caller("boxed", "1", convolve, Boxed, lambda box: box.array, **fields)


def gradients_of_boxes(y, grad_output, inputs):
    arrays = [box.array for box in inputs]
    gradients = dcn_np.modulated_deform_conv_backward(
        grad_output.array, *arrays[:4], **overhead.TINY.parameters
    )
    return map(Boxed, gradients)


def test_other_arrays_are_validated_and_timed_beside_numpy_s():
    callers = [bench.DcnNp(), boxed_caller(backward=gradients_of_boxes)]
    for passes, names in (("forward", {"y"}), ("both", set(NAMES))):
        cases = bench_timing.time_problem(overhead.TINY, passes, callers, rounds=2)
        assert [set(case.residuals) for case in cases] == [names, names]
        assert overhead.beyond(cases[0], cases) == 0
        difference = sum(one - own for one, own in zip(cases[1].seconds, cases[0].seconds, strict=True)) / 2
        assert overhead.beyond(cases[1], cases) == pytest.approx(difference * 1e6)
    assert bench_timing.time_problem(overhead.TINY, "both", [boxed_caller()], rounds=1) == []


def test_overhead_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    def not_there():
        raise ImportError("no such library")

    libraries = {"other": lambda: [boxed_caller()], "absent": not_there}
    monkeypatch.setattr(overhead, "LIBRARIES", libraries)
    monkeypatch.setattr(overhead, "GOALS", {"boxed": 1e6, "not there": 5.0})
    file = tmp_path / "overhead.json"
    assert overhead.main(["--rounds", "2", "--json", str(file)]) == 0
    output = capsys.readouterr()
    assert "without absent: ImportError: no such library" in output.err
    assert "at most 1e+06 us" in output.out
    record = json.loads(file.read_text())
    timed = [(result["implementation"], result["passes"]) for result in record["results"]]
    assert timed == [("dcn_np", "forward"), ("boxed", "forward"), ("dcn_np", "both")]
    assert record["results"][0]["beyond"] == 0
    assert [goal["met"] for goal in record["goals"]] == [True, None]
    assert record["goals"][0]["reached"] == record["results"][1]["beyond"]
    assert record["versions"]["boxed"] == "1"


def test_overhead_of_wrong_results_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "LIBRARIES", {"other": lambda: [boxed_caller(1.001)]})
    assert overhead.main(["--rounds", "1"]) == 1
    assert "refused: y: residual" in capsys.readouterr().out


def test_overhead_of_numpy_alone(capsys):
    assert overhead.main(["--libraries", "none", "--rounds", "1"]) == 0
    assert "not measured: 4 goals" in capsys.readouterr().out
