"""Set two files of measurements side by side: python benchmarks/compare.py before.json after.json

The ratio is the second median over the first: below 1 the second is faster. Two runs are not interleaved, so
where both files have the ordinary convolution the last column compares the ratios to it instead: that cancels
a machine that was slower as a whole.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcn_np.commands.bench import BASELINE, SCHEMA
from dcn_np.commands.bench_timing import in_round_ratio

KEY = ("shape", "passes", "dtype", "threads", "implementation")
Key = tuple[Any, ...]


def read(path: Path) -> dict[str, Any]:
    """A file that run.py or ``python -m dcn_np bench`` wrote."""
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("schema") != SCHEMA or "results" not in record:
        raise SystemExit(f"{path} has no times of schema {SCHEMA}")
    return record


def by_key(record: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The timed cases by what they are."""
    results = [result for result in record["results"] if result["seconds"]]
    return {tuple(result[name] for name in KEY): result for result in results}


def to_baseline(results: dict[Key, dict[str, Any]], key: Key) -> float:
    """The ratio to the ordinary convolution inside the rounds, NaN without one."""
    other = results.get((*key[:-1], BASELINE))
    return in_round_ratio(results[key]["seconds"], other["seconds"] if other else ())


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The lines of the table; cases that only one file has are named below it."""
    first, second = by_key(before), by_key(after)
    lines = [f"{'case':52}{'before ms':>12}{'after ms':>12}{'ratio':>8}{'ratio of ratios':>17}"]
    ratios: dict[str, list[float]] = {}
    for key in (key for key in first if key in second):
        old, new = first[key]["median"], second[key]["median"]
        ratios.setdefault(key[-1], []).append(new / old)
        relative = to_baseline(second, key) / to_baseline(first, key)
        text = f"{_name(key):52}{old * 1e3:12.3f}{new * 1e3:12.3f}{new / old:8.3f}"
        lines.append(text + (f"{'-':>17}" if math.isnan(relative) else f"{relative:17.3f}"))
    for name, values in ratios.items():
        lines.append(f"{'geometric mean, ' + name:76}{statistics.geometric_mean(values):8.3f}")
    for title, keys in (("before", first.keys() - second.keys()), ("after", second.keys() - first.keys())):
        lines += [f"only {title}: {_name(key)}" for key in sorted(keys)]
    return lines


def _name(key: Key) -> str:
    shape, passes, dtype, threads, implementation = key
    return f"{shape} {passes} {dtype}, {threads} thread{'s' if threads > 1 else ''}, {implementation}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the two environments and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args(words)
    records = [read(arguments.before), read(arguments.after)]
    for title, record in zip(("before", "after"), records, strict=True):
        words_about = (record.get("commit") or record["versions"]["dcn_np"], record["isa"], record["machine"])
        print(f"{title}: {', '.join(words_about)}, {record['date']}")
    print(*compare(*records), sep="\n")


if __name__ == "__main__":
    main()
