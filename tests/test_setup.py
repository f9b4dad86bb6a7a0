"""What setup.py asks of the compilers of other systems than this one."""

import runpy
import sysconfig
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
if not SETUP.exists():
    pytest.skip("away from the sources", allow_module_level=True)


@pytest.fixture
def setup_for(monkeypatch):
    """Return a function that runs setup.py, short of building, as on a platform."""

    def run(platform, **variables):
        here = sysconfig.get_config_var
        monkeypatch.delenv("DCN_NP_SANITIZE", raising=False)
        monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: variables.get(name, here(name)))
        monkeypatch.setattr("subprocess.check_output", lambda command, text: "clang_rt.builtins.lib\r\n")
        return runpy.run_path(str(SETUP))

    return run


@pytest.mark.parametrize("platform", ["linux-x86_64", "macosx-15.0-x86_64", "win-amd64"])
def test_every_system_has_the_instruction_sets_of_its_machine(setup_for, platform):
    assert list(setup_for(platform)["instruction_sets"]()) == ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("platform", ["linux-riscv64", "macosx-15.0-arm64"])
def test_other_machines_have_a_baseline_without_flags_of_one_compiler(setup_for, platform):
    assert setup_for(platform)["instruction_sets"]() == {"baseline": []}


def test_clang_cl_gets_flags_in_its_own_spelling(setup_for):
    setup = setup_for("win-amd64")
    flags, link_flags = setup["build_flags"]()
    assert not {"-fPIC", "-fvisibility=hidden"} & set(flags)
    assert link_flags == ["clang_rt.builtins.lib"]
    for _, library in setup["libraries"](flags):
        assert all(flag.startswith("/clang:-") for flag in library["cflags"])


def test_elsewhere_flags_are_as_they_are(setup_for):
    setup = setup_for("linux-x86_64")
    flags, link_flags = setup["build_flags"]()
    (_, baseline), *_ = setup["libraries"](flags)
    assert baseline["cflags"] == flags
    assert {"-fPIC", "-fvisibility=hidden", "-O3", "-g0"} <= set(flags)
    assert link_flags == ["-Wl,-S"]


@pytest.mark.parametrize(("disabled", "stable"), [(1, False), (0, True), (None, True)])
def test_a_python_without_the_gil_gets_no_stable_abi(setup_for, disabled, stable):
    assert setup_for("linux-x86_64", Py_GIL_DISABLED=disabled)["STABLE_ABI"] is stable
