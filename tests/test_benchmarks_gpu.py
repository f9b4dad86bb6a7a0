"""Does benchmarks/gpu.py judge what was measured, and keep it? The GPU itself is only rehearsed, on a CPU."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

gpu = importlib.import_module("gpu")
gates = importlib.import_module("on_gpu.gates")
problems = importlib.import_module("on_gpu.problems")

C256, C512 = (problems.SHAPES[name] for name in ("C256-56x56-N16", "C512-25x42-N8"))
FASTER = "float16 forward, faster than torchvision: local, channels-last"


def result(shape, implementation, seconds, mode="float16", **fields):
    layout = {"torchvision": "NCHW"}.get(implementation, "channels-last")
    fields = {"offsets": "local", "passes": "forward", "layout": layout, **fields}
    seconds = [seconds] * 3 if isinstance(seconds, float) else seconds
    return problems.Result(
        shape, mode=mode, implementation=implementation, seconds=seconds, host_seconds=seconds, **fields
    )


def row(title, results=(), accuracy=()):
    (found,) = (row for row in gates.rows(results, accuracy) if row.title == title)
    return found


@pytest.mark.parametrize(
    ("shape", "times", "met", "goal_met"),
    [(C256, 2.4, False, False), (C256, 2.5, True, False), (C256, 5.0, True, True), (C512, 1.5, True, False)],
)
def test_a_gate_depends_on_the_channels(shape, times, met, goal_met):
    results = [result(shape, "dcn_np", 1.0), result(shape, "torchvision", times)]
    found = row(FASTER, results)
    assert (found.met, found.goal_met) == (met, goal_met)
    assert found.worst == gates.Reached(shape.name, times, 1.5 if shape is C512 else 2.5)


def test_every_shape_has_to_meet_a_gate():
    results = [result(shape, "dcn_np", 1.0) for shape in (C256, C512)]
    results += [result(C256, "torchvision", 2.0), result(C512, "torchvision", 9.0)]
    found = row(FASTER, results)
    assert not found.met
    assert found.worst.where == C256.name
    assert "NOT MET" in str(found)
    assert "goal 5x: NOT MET" in str(found)
    (mean,) = gates.means(results)
    assert "mean 4.24" in mean


def test_ratios_are_taken_inside_rounds():
    results = [result(C256, "dcn_np", [1.0, 2.0, 4.0]), result(C256, "torchvision", [3.0, 6.0, 4.0])]
    assert row(FASTER, results).worst.value == 3.0


def test_the_ordinary_convolution_may_be_faster():
    results = [result(C256, "dcn_np", 1.9), result(C256, "convolution", 1.0)]
    found = row("float16 forward, time to convolution: local, channels-last", results)
    assert (found.met, found.goal_met) == (True, False)
    results[0].seconds = [2.1] * 3
    assert not row(found.title, results).met


def test_tf32_is_compared_with_what_torchvision_does_by_default():
    results = [
        result(C256, "dcn_np", 1.0, "tf32"),
        result(C256, "torchvision", 3.0, "tf32"),
        result(C256, "torchvision", 8.5, "float32"),
    ]
    found = row("tf32 forward, faster than torchvision float32: local, channels-last", results)
    assert (found.worst.value, found.met, found.goal_met) == (8.5, True, True)


def test_offsets_layouts_and_passes_are_kept_apart():
    results = [result(C256, "dcn_np", 1.0), result(C256, "torchvision", 9.0, offsets="scattered")]
    assert row(FASTER, results).met is None
    results = [result(C256, "dcn_np", 1.0, passes="both"), result(C256, "torchvision", 9.0, passes="both")]
    assert row(FASTER, results).met is None
    assert row("float16 forward + backward, faster than torchvision: local, channels-last", results).met
    assert row("float16 forward + backward, faster than torchvision: local, NCHW", results).met is None


def test_a_result_of_ours_that_was_refused_meets_no_gate():
    results = [result(C256, "dcn_np", [], refused="wrong"), result(C256, "torchvision", 9.0)]
    found = row(FASTER, [*results, result(C512, "dcn_np", 1.0), result(C512, "torchvision", 9.0)])
    assert found.met is False
    assert found.worst.where == f"{C256.name} refused"
    assert "REFUSED: wrong" in problems.line(results[0])
    # Of theirs it is nothing that we could reach.
    results = [result(C256, "dcn_np", 1.0), result(C256, "torchvision", [], refused="no memory")]
    assert row(FASTER, results).met is None


def test_accuracy_is_ours_at_every_size():
    title = "float16 forward, relative error"

    def measured(implementation, error, image="56x56"):
        return problems.Accuracy(image, "local", implementation, "NCHW", error)

    assert row(title).met is None
    theirs = measured("torchvision", 1e-2)
    assert row(title, (), [measured("dcn_np", 2e-4), theirs]).met
    far = measured("dcn_np", 4e-4, "200x334")
    assert row(title, (), [measured("dcn_np", 2e-4), far, theirs]).met is False
    assert row(title, (), [measured("dcn_np", math.inf)]).met is False


@pytest.mark.parametrize(
    ("layout", "extra", "met"),
    [
        ("channels-last", 1000, True),  # the packed weights
        ("channels-last", 1000 + 100_000, False),
        ("NCHW", 1000 + 100_000, True),
        ("NCHW", 1000 + 110_000, False),
        ("NCHW", None, None),
    ],
)
def test_memory_is_counted_in_copies_of_x(layout, extra, met):
    measured = result(
        C256, "dcn_np", 1.0, layout=layout, extra_bytes=extra, x_bytes=100_000, weight_bytes=1000
    )
    title = f"forward, extra memory beside packed weights, in copies of x: {layout}"
    assert row(title, [measured]).met is met


def test_the_table_has_every_gate():
    rows = gates.rows([], [])
    assert len(rows) == len(gates.GATES) * 4 + 1 + 2
    text = gates.table(rows)
    assert all(row.title in text for row in rows)
    assert text.endswith(f"0 met, 0 NOT MET, {len(rows)} not measured")


def test_options():
    def arguments(*words):
        return gpu.parser().parse_args(words)

    assert gpu.chosen_shapes(arguments()) == list(problems.SHAPES.values())
    assert [shape.name for shape in gpu.chosen_shapes(arguments("--quick"))] == list(problems.QUICK)
    assert gpu.chosen_shapes(arguments("--shapes", C512.name, "--quick")) == [C512]
    assert {shape.name for shape in gpu.chosen_shapes(arguments("--device", "cpu"))} == set(
        problems.REHEARSAL
    )
    # Modes of one dtype share their rounds, whatever order they are named in.
    chosen = arguments("--modes", "tf32,float16,float32").modes
    assert gpu.groups(chosen) == [("float16", ["float16"]), ("float32", ["float32", "tf32"])]
    with pytest.raises(SystemExit):
        gpu.main(["--rounds", "0"])


def test_a_file_is_never_written_over(tmp_path):
    names = []
    for _ in range(3):
        path = gpu.result_file(tmp_path, "NVIDIA H100 80GB HBM3", "2026-11-24")
        path.touch()
        names.append(path.name)
    name = "gpu-nvidia-h100-80gb-hbm3-2026-11-24"
    assert names == [f"{name}.json", f"{name}-2.json", f"{name}-3.json"]


def test_what_was_measured_survives_a_step_that_fails(tmp_path, capsys):
    record = gpu.Record({"schema": gpu.SCHEMA}, tmp_path / "results" / "gpu.json")
    with record.step("right"):
        record.results.append(result(C256, "dcn_np", 1.0, errors={"y": math.inf}))
        record.accuracy.append(problems.Accuracy("56x56", "local", "dcn_np", "NCHW", 2e-4))
    with record.step("wrong"):
        raise MemoryError("no room")
    written = json.loads(record.path.read_text())
    assert written["failed"] == ["wrong: MemoryError: no room"]
    assert "FAILED: MemoryError: no room" in capsys.readouterr().out
    (measured,) = written["results"]
    assert (measured["shape"], measured["median"], measured["errors"]) == (C256.name, 1.0, {"y": None})
    assert [row["error"] for row in written["accuracy"]] == [2e-4]
    assert len(written["gates"]) == len(gates.rows([], []))


@pytest.fixture
def torchvision():
    """torch and torchvision that work; there are wheels of the second that fail beside those of the first."""
    pytest.importorskip("torch")
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision: {error}")


def test_the_rehearsal_runs_to_its_end(torchvision, tmp_path, capsys):
    path = tmp_path / "rehearsal.json"
    words = ["--device", "cpu", "--quick", "--rounds", "1", "--offsets", "local", "--json", str(path)]
    assert gpu.main(words) == 0
    written = json.loads(path.read_text())
    assert written["failed"] == []
    assert {row["mode"] for row in written["results"]} == set(problems.MODES)
    assert {row["implementation"] for row in written["results"]} == {"dcn_np", "torchvision", "convolution"}
    assert all(row["refused"] is None and row["median"] > 0 for row in written["results"])
    assert len(written["accuracy"]) == 2 * 3
    assert "not measured" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(torchvision, monkeypatch):
    devices, layers, timing = (
        importlib.import_module(f"on_gpu.{name}") for name in ("devices", "layers", "timing")
    )
    prepare = layers.DcnNp.prepare

    def wrong(self, inputs, passes):
        run = prepare(self, inputs, passes)
        return lambda: {name: array * 1.01 for name, array in run().items()}

    device = devices.Host()
    shape = problems.REHEARSAL[problems.REHEARSAL_QUICK[0]]
    sets = timing.Sets.of(device, shape, "local", "float32", "forward")
    found = layers.layers_of(device, ["float32"])
    monkeypatch.setattr(layers.DcnNp, "prepare", wrong)
    results = timing.time_sets(device, sets, "forward", found, 1)
    for one in results:
        assert bool(one.refused) == (one.implementation == "dcn_np")
        assert bool(one.seconds) == (one.implementation != "dcn_np")
    assert results[0].refused == "relative error above 5.0e-05: y 1.0e-02, y in a batch 1.0e-02"
