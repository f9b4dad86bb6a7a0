"""python -m dcn_np doctor: what this installation is made of, and whether it computes correctly."""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
import time
from typing import Any

import numpy

import dcn_np
from dcn_np import cpu
from dcn_np.commands import machine
from dcn_np.commands.comparison import ALLOWED_ROUNDINGS
from dcn_np.commands.selftest import Finding, self_test
from dcn_np.cpu import _native
from dcn_np.cuda.modules import cache_folder

Report = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="write the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Print the report; 0 when the self-test passed."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else "\n".join(render(report)))
    return 0 if report["self_test"]["passed"] else 1


def examine() -> Report:
    """Collect what the report shows; the self-test comes first, so that all libraries are loaded."""
    tested = report_self_test()
    return {
        "versions": {
            "dcn_np": dcn_np.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "cpu": machine.cpu_model(),
        "instruction_set": {
            "in_use": dcn_np.isa(),
            "available": list(dcn_np.available_isas()),
            "unsupported": [name for name, supported in _native.isas() if not supported],
            "DCN_NP_ISA": os.environ.get("DCN_NP_ISA"),
        },
        "threads": {**threads_in_use(), "limits": machine.thread_limits()},
        "openmp_runtimes": machine.openmp_runtimes(),
        "openmp_problem": cpu.openmp_problem and cpu.NO_OPENMP.format(cpu.openmp_problem),
        "optional_packages": machine.optional_packages(),
        "gpu": report_gpu(),
        "self_test": tested,
    }


def threads_in_use() -> Report:
    """How many threads a call uses, or what is wrong with the setting."""
    try:
        return {"in_use": dcn_np.get_num_threads(), "problem": None}
    except ValueError as error:
        return {"in_use": None, "problem": str(error)}


def report_gpu() -> Report:
    """What there is to compute on CuPy's arrays, and what is missing."""
    devices, compiler = machine.gpus(), machine.nvrtc()
    cupy = machine.optional_packages()["cupy"]
    return {
        "devices": devices,
        "nvrtc": compiler,
        "cache": str(cache_folder()),
        "advice": machine.gpu_advice(devices, cupy, compiler["version"]),
    }


def report_self_test() -> Report:
    """Run the self-test and put its findings into the form of the report."""
    start = time.perf_counter()
    findings = self_test()
    return {
        "passed": bool(findings) and all(finding.problem is None for finding in findings),
        "seconds": round(time.perf_counter() - start, 3),
        "allowed_roundings": ALLOWED_ROUNDINGS,
        "findings": [json_safe(finding) for finding in findings],
    }


def json_safe(finding: Finding) -> Report:
    """A finding as a dictionary; JSON has no infinity and no NaN, so these become null."""
    roundings = {name: value if numpy.isfinite(value) else None for name, value in finding.roundings.items()}
    return {**finding._asdict(), "roundings": roundings}


def render(report: Report) -> list[str]:
    """Return the report as lines of text."""
    versions = report["versions"]
    return [
        f"dcn_np {versions['dcn_np']}, NumPy {versions['numpy']}, Python {versions['python']}",
        f"{versions['platform']}, {report['cpu']}",
        "",
        *render_instruction_set(report["instruction_set"]),
        "",
        *render_threads(report["threads"]),
        "",
        *render_openmp(report["openmp_runtimes"], report["openmp_problem"]),
        "",
        *render_optional(report["optional_packages"]),
        "",
        *render_gpu(report["gpu"]),
        "",
        *render_self_test(report["self_test"]),
    ]


def render_instruction_set(found: Report) -> list[str]:
    """Which instruction set runs, and why."""
    reason = f"DCN_NP_ISA={found['DCN_NP_ISA']}" if found["DCN_NP_ISA"] else "the best one available"
    return [
        f"Instruction set: {found['in_use']} ({reason})",
        f"  built in and supported by this processor:      {', '.join(found['available'])}",
        f"  built in, but not supported by this processor: {', '.join(found['unsupported']) or 'none'}",
    ]


def render_threads(threads: Report) -> list[str]:
    """How many threads a call uses, and every limit on that."""
    lines = [f"Threads: {threads['problem'] or threads['in_use']}; the least of these limits counts"]
    for name, limit in threads["limits"].items():
        lines.append(f"  {name:<44} {'not set' if limit is None else limit}")
    return lines


def render_openmp(runtimes: list[str], problem: str | None = None) -> list[str]:
    """Which OpenMP runtimes are loaded, with a warning about more than one, or about ours missing."""
    lines = [f"OpenMP runtimes in this process: {len(runtimes)}", *(f"  {path}" for path in runtimes)]
    if len(runtimes) > 1:
        lines += [
            f"  There are {len(runtimes)}: each keeps threads of its own. Results are not affected; if",
            "  threads compete for processors, limit one library, for example with dcn_np.set_num_threads.",
        ]
    return lines if problem is None else [*lines, *(f"  {line}" for line in textwrap.wrap(problem, 100))]


def render_optional(packages: dict[str, str | None]) -> list[str]:
    """Optional packages, none of which is needed."""
    found = [f"{name} {version}" for name, version in packages.items() if version]
    absent = [name for name, version in packages.items() if not version]
    return [
        "Optional packages (none is needed, none was imported)",
        f"  found:  {', '.join(found) or 'none'}",
        f"  absent: {', '.join(absent) or 'none'}",
    ]


def render_gpu(gpu: Report) -> list[str]:
    """Which GPUs there are, and what compiles for them."""
    compiler = (
        f"{gpu['nvrtc']['version']}, {gpu['nvrtc']['path']}" if gpu["nvrtc"]["version"] else "none found"
    )
    return [
        f"GPU: {'; '.join(gpu['devices']) or 'none found'}",
        f"  {'NVRTC, which compiles the kernels':<44} {compiler}",
        f"  {'compiled kernels are kept in':<44} {gpu['cache']}",
        f"  {gpu['advice']}",
    ]


def render_self_test(tested: Report) -> list[str]:
    """The largest error of each instruction set, what failed, and the verdict."""
    lines = [
        f"Self-test against the reference: forward and all gradients, {tested['seconds']:.2f} s",
        f"  largest error in units of rounding (up to {tested['allowed_roundings']:g} allowed)",
    ]
    for isa in dict.fromkeys(finding["instruction_set"] for finding in tested["findings"]):
        lines += render_findings(isa, [f for f in tested["findings"] if f["instruction_set"] == isa])
    return [
        *lines,
        "Everything is in order."
        if tested["passed"]
        else "FAILED: do not trust the results above marked so.",
    ]


def render_findings(isa: str, findings: list[Report]) -> list[str]:
    """One line for an instruction set, and one for each case that failed on it."""
    errors = [value for finding in findings for value in finding["roundings"].values() if value is not None]
    failed = [finding for finding in findings if finding["problem"]]
    verdict = f"FAILED {len(failed)} of" if failed else "passed"
    worst = f", largest error {max(errors):.3g}" if errors else ""
    lines = [f"  {isa:<10} {verdict} {len(findings)} cases{worst}"]
    return lines + [f"    FAILED {finding['case']}: {finding['problem']}" for finding in failed]
