"""Do the commands of `python -m dcn_np` do what they say, and do they notice what is wrong?"""

import importlib.util
import json
import re
import subprocess
import sys

import numpy
import pytest

import dcn_np
from dcn_np import cpu
from dcn_np.__main__ import main
from dcn_np.commands import comparison, demo, doctor, machine, selftest

PICTURES = ("sampling_points.png", "responses.png", "gradient.png", "digits.png")
MISSING = [package for module, package in demo.NEEDED.items() if importlib.util.find_spec(module) is None]
needs_demo_extra = pytest.mark.skipif(bool(MISSING), reason=f"the demo extra is not installed: {MISSING}")


def output_of(capsys, *arguments):
    status = main(arguments)
    return status, capsys.readouterr().out


def doctor_report(capsys):
    status, text = output_of(capsys, "doctor", "--json")
    return status, json.loads(text)


@pytest.fixture
def broken_forward(monkeypatch):
    """Make the forward wrong in one element by one part in a thousand."""
    right = dcn_np.modulated_deform_conv

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        y.flat[y.size // 2] += numpy.abs(y).max() / 1000
        return y

    monkeypatch.setattr(dcn_np, "modulated_deform_conv", wrong)


@pytest.fixture
def broken_backward(monkeypatch):
    """Make grad_offset wrong: its axes are swapped."""
    right = dcn_np.modulated_deform_conv_backward

    def wrong(*args, **kwargs):
        gradients = right(*args, **kwargs)
        if gradients.offset is None:
            return gradients
        return gradients._replace(offset=numpy.ascontiguousarray(gradients.offset[:, ::-1]))

    monkeypatch.setattr(dcn_np, "modulated_deform_conv_backward", wrong)


# doctor


def test_doctor_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "dcn_np", "doctor"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    for expected in (
        dcn_np.__version__,
        dcn_np.isa(),
        "Threads",
        "OpenMP runtimes",
        "Everything is in order.",
    ):
        assert expected in run.stdout


def test_doctor_reports_what_is_in_use(capsys):
    status, report = doctor_report(capsys)
    assert status == 0
    assert report["versions"]["dcn_np"] == dcn_np.__version__
    assert report["instruction_set"]["in_use"] == dcn_np.isa()
    assert report["instruction_set"]["available"] == list(dcn_np.available_isas())
    assert report["threads"]["in_use"] == dcn_np.get_num_threads()
    assert report["self_test"]["passed"] is True


def test_doctor_tests_every_instruction_set_and_all_results(capsys):
    _, report = doctor_report(capsys)
    findings = report["self_test"]["findings"]
    assert {finding["instruction_set"] for finding in findings} == set(dcn_np.available_isas())
    assert {finding["case"] for finding in findings} == {case.name for case in selftest.CASES}
    results = {"y", "grad_x", "grad_offset", "grad_mask", "grad_weight", "grad_bias"}
    assert all(set(f["roundings"]) == results for f in findings if f["case"] in ("1-D", "2-D", "3-D"))


@pytest.mark.usefixtures("broken_forward")
def test_doctor_notices_a_wrong_forward(capsys):
    status, report = doctor_report(capsys)
    assert status == 1
    assert report["self_test"]["passed"] is False
    assert all(finding["problem"] == "wrong: y" for finding in report["self_test"]["findings"])


@pytest.mark.usefixtures("broken_backward")
def test_doctor_notices_a_wrong_gradient(capsys):
    status, text = output_of(capsys, "doctor")
    assert status == 1
    assert "FAILED 2-D: wrong: grad_offset" in text
    assert "Everything is in order." not in text


def test_doctor_reports_a_kernel_that_raises(capsys, monkeypatch):
    def raising(*args, **kwargs):
        raise MemoryError("no memory")

    monkeypatch.setattr(dcn_np, "modulated_deform_conv_backward", raising)
    status, report = doctor_report(capsys)
    assert status == 1
    assert all("MemoryError: no memory" in finding["problem"] for finding in report["self_test"]["findings"])


def test_doctor_reports_a_bad_thread_setting(capsys, monkeypatch):
    monkeypatch.setenv("DCN_NP_NUM_THREADS", "many")
    status, text = output_of(capsys, "doctor")
    assert status == 1
    assert "DCN_NP_NUM_THREADS is 'many'" in text


def test_openmp_runtimes_are_counted_once_each(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 08:01 11 /usr/lib/libgomp.so.1.0.0\n"
        "7f01-7f02 r-xp 00001000 08:01 11 /usr/lib/libgomp.so.1.0.0\n"
        "7f02-7f03 r-xp 00000000 08:01 12 /venv/my libs/libgomp-24e2ab19.so.1.0.0\n"
        "7f03-7f04 r-xp 00000000 08:01 13 /venv/libiomp5.so\n"
        "7f04-7f05 r-xp 00000000 08:01 14 /usr/lib/libgompertz-data.txt\n"
        "7f05-7f06 rw-p 00000000 00:00 0 \n"
    )
    assert machine.openmp_runtimes(str(maps)) == [
        "/usr/lib/libgomp.so.1.0.0",
        "/venv/libiomp5.so",
        "/venv/my libs/libgomp-24e2ab19.so.1.0.0",
    ]


def test_doctor_warns_of_two_openmp_runtimes():
    two = "\n".join(doctor.render_openmp(["/a/libgomp.so.1", "/b/libgomp-24e2ab19.so.1"]))
    assert "There are 2" in two
    assert "/b/libgomp-24e2ab19.so.1" in two
    assert "There are" not in "\n".join(doctor.render_openmp(["/a/libgomp.so.1"]))


def test_doctor_says_why_there_is_no_openmp(monkeypatch, capsys):
    problem = "libgomp.so.1: cannot allocate memory in static TLS block"
    monkeypatch.setattr(cpu, "openmp_problem", problem)
    _, report = doctor_report(capsys)
    assert report["openmp_problem"] == cpu.NO_OPENMP.format(problem)
    _, text = output_of(capsys, "doctor")
    assert problem in " ".join(text.split())
    assert "LD_PRELOAD" in text


def test_doctor_imports_no_optional_package():
    code = (
        "import sys; from dcn_np.__main__ import main; main(['doctor']); from dcn_np.commands import machine;"
        "print([name for name in machine.OPTIONAL_PACKAGES if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_a_folder_is_not_an_optional_package(tmp_path, monkeypatch):
    (tmp_path / "nosuchpackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.version_of("nosuchpackage", ("nosuchpackage",)) is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H200, 570.1, 143771 MiB'; echo 'NVIDIA T4, 570.1, 15360 MiB'", 2),
        ("echo 'no driver' >&2; exit 9", 0),
    ],
)
def test_gpus_are_what_nvidia_smi_says(script, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/nvidiactl", "/dev/nvidia-uvm"])
    assert len(machine.gpus()) == expected


@pytest.mark.parametrize(
    ("devices", "cupy", "compiler", "said"),
    [
        ([], None, None, "nothing is missing"),
        ([], "14.2", "13.0", "no NVIDIA driver"),
        (["H200"], None, None, r"dcn_np\[cuda13\]"),
        (["H200"], "14.2", None, "pip install nvidia-cuda-nvrtc"),
        (["H200"], "14.2", "13.0", "everything .* is there"),
    ],
)
def test_doctor_says_what_a_gpu_lacks(devices, cupy, compiler, said):
    assert re.search(said, machine.gpu_advice(devices, cupy, compiler))


def test_doctor_finds_no_compiler_where_there_is_none(monkeypatch):
    def nothing():
        raise ImportError

    monkeypatch.setattr(machine.cuda_nvrtc, "nvrtc", nothing)
    assert machine.nvrtc() == {"version": None, "path": None}


# the comparison that both rest on


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compare_counts_roundings(dtype):
    expected = numpy.ones(2)
    result = expected.astype(dtype)
    result[1] += 3 * numpy.finfo(dtype).eps
    assert comparison.compare("y", result, expected, numpy.ones(2)).roundings == pytest.approx(6, rel=1e-3)


@pytest.mark.parametrize("wrong", [numpy.nan, numpy.inf, 1e-20])
def test_compare_refuses_anything_but_zero_where_no_term_reaches(wrong):
    result = numpy.array([0, wrong], numpy.float32)
    assert not comparison.compare("y", result, numpy.zeros(2), numpy.zeros(2)).passed
    assert comparison.compare("y", 0 * result[:1], numpy.zeros(1), numpy.zeros(1)).passed


def test_compare_refuses_another_shape():
    assert not comparison.compare("y", numpy.zeros((1, 2)), numpy.zeros((2, 1)), 1.0).passed


# demo


@needs_demo_extra
def test_demo_checks_and_draws(capsys, tmp_path):
    status, text = output_of(capsys, "demo", "--size", "48", "--output", str(tmp_path / "pictures"))
    assert status == 0, text
    assert "WRONG" not in text
    assert "All 12 checks passed." in text
    assert f"{dcn_np.isa()}" in text
    for name in PICTURES:
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


@needs_demo_extra
@pytest.mark.usefixtures("broken_forward")
def test_demo_notices_a_wrong_forward(capsys, tmp_path):
    status, text = output_of(capsys, "demo", "--size", "32", "--output", str(tmp_path))
    assert status == 1
    assert "WRONG: y, y" in text


@needs_demo_extra
@pytest.mark.usefixtures("broken_backward")
def test_demo_notices_a_wrong_gradient(capsys, tmp_path):
    status, text = output_of(capsys, "demo", "--size", "32", "--output", str(tmp_path))
    assert status == 1
    assert "WRONG: grad_offset" in text


def test_demo_names_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(demo.NEEDED, "no_such_module", "no-such-package")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert "pip install 'dcn_np[demo]'" in message


@pytest.mark.parametrize(
    ("words", "option"), [(["demo", "--output"], "--output"), (["bench", "--json"], "--json")], ids=str
)
def test_where_nothing_can_be_written_is_known_at_once(words, option, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*words, str(tmp_path / "file" / "below")]) == 1
    out, message = capsys.readouterr()
    assert out.count("\n") <= 2  # nothing was computed yet
    assert f"{words[0]}: {option} cannot be " in message


@pytest.mark.parametrize("words", [["demo"], ["bench", "--shapes", "S9"], ["see"]], ids=str)
def test_a_wrong_limit_of_threads_is_refused_at_once(words, capsys, monkeypatch):
    monkeypatch.setenv("DCN_NP_NUM_THREADS", "0")
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    out, message = capsys.readouterr()
    assert not out
    assert message.endswith("error: DCN_NP_NUM_THREADS is '0'; wanted an integer of at least 1\n")


@pytest.mark.parametrize("size", ["0", "31", "-5", "big"])
def test_demo_refuses_a_bad_size(size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--size", size])
    assert stop.value.code == 2
    assert "--size" in capsys.readouterr().err


# the command line


@pytest.mark.parametrize("command", ["doctor", "demo", "bench", "see"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m dcn_np {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_an_unknown_command_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
