"""Does benchmarks/analysis.py measure what it says?"""

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

analysis = importlib.import_module("analysis")


def test_a_line_for_each_analysis(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analysis.py", "--nodes", "2"])
    monkeypatch.setattr(analysis.importlib.util, "find_spec", lambda name: None)
    analysis.main()
    traced, *saliency = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"trace of 100 nodes through 3 levels: 0\.\d{3} s", traced)
    assert len(saliency) == 3
    for line in saliency:
        error, area = re.search(r"errors at most (0\.\d+), mean area (\d+\.\d+) %", line).groups()
        assert float(error) <= 0.1
        assert 0 < float(area) < 20
