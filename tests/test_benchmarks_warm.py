"""Does benchmarks/warm.py time right results only, before and after a layer was prepared?"""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dcn_np import layers
from dcn_np.commands.bench_problems import PROBLEMS, Problem

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks folder is not here", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

warm = importlib.import_module("warm")

KINDS = [warm.OPERATOR, *warm.LAYERS]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Problems of the same names that take no time."""
    tiny = Problem("", "", 1, 4, 6, (7, 9), offset_groups=2)
    problems = {name: dataclasses.replace(tiny, name=name) for name in (*warm.SHAPES, warm.EVEN)}
    monkeypatch.setattr(warm, "PROBLEMS", PROBLEMS | problems)


def test_a_line_for_each_call_and_a_row_for_each_goal(tmp_path, capsys):
    file = tmp_path / "warm.json"
    assert warm.main(["--rounds", "2", "--calls", "20", "--threads", "1", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    for kind in KINDS:
        assert len(re.findall(rf"^{kind}  .* \d\.\de-\d\d$", said, re.MULTILINE)) == 2
        assert len(re.findall(rf"^{kind}, prepared .* \d+\.\d\d  ", said, re.MULTILINE)) == 2
    assert "ModulatedDeformConv2d, prepared, threads 1: 20 calls in a row: median 0." in said
    record = json.loads(file.read_text())
    assert [len(record[name]) for name in ("results", "latencies", "goals")] == [12, 1, 7]
    before, after = record["results"][6:8]
    ratios = [one / other for one, other in zip(before["seconds"], after["seconds"], strict=True)]
    reached = {row["title"]: row["reached"] for row in record["goals"]}
    assert reached["operator, prepared, threads 1: faster than before"] == pytest.approx(np.median(ratios))
    (latencies,) = record["latencies"]
    uneven = reached["ModulatedDeformConv2d, prepared, threads 1: p99 to the median"]
    assert uneven == pytest.approx(latencies["p99"] / latencies["median"])
    assert 0 < latencies["median"] <= latencies["p99"] <= latencies["longest"]


def test_the_offsets_that_are_timed_are_no_whole_numbers():
    problem = warm.PROBLEMS["S1"]
    data = warm.data_of(problem, warm.layer_of(problem, "ModulatedDeformConv2d"))
    assert np.abs(data.offset - np.round(data.offset)).mean() > 0.1
    assert 0.2 < data.offset.std() < 4


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("forward", lambda y: y * np.float32(1.001), "Conv2d: y: residual"),
        ("branch", lambda made: (made[0] + 1, made[1]), "offsets: not the first channels"),
        ("branch", lambda made: (made[0], made[1] + np.float32(1e-3)), "mask: not the logistic function"),
    ],
)
def test_a_wrong_result_is_not_timed(monkeypatch, capsys, name, wrong, message):
    kind = layers.ModulatedDeformConv2d if name == "branch" else layers.Conv2d
    right = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda layer, x, **given: wrong(right(layer, x, **given)))
    assert warm.main(["--rounds", "1", "--calls", "1", "--threads", "1"]) == 1
    assert message in capsys.readouterr().err


def test_other_bits_than_before_are_not_timed(monkeypatch, capsys):
    prepared = warm.prepared_layer

    def one_bit_off(layer, data):
        call = prepared(layer, data)
        return lambda: np.nextafter(call(), np.float32(9))

    monkeypatch.setattr(warm, "prepared_layer", one_bit_off)
    assert warm.main(["--rounds", "1", "--calls", "1", "--threads", "1"]) == 1
    assert "Conv2d, prepared: other bits than Conv2d" in capsys.readouterr().err
