"""What is said where Python, NumPy or the extension is not what the package needs."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from calls import environment

import dcn_np
from dcn_np import _requirements

PACKAGE = Path(dcn_np.__file__).parent
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
MACHINE_OF_AN_ELF_FILE = slice(18, 20)
AARCH64, SPARC = 183, 2


def error_of(code, folder=PACKAGE.parent):
    """Run code in a process of its own that must end in an error, and return the last line of it."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


# ---- versions


def test_an_older_python_is_named():
    said = error_of("sys.version_info = (3, 10, 14, 'final', 0)\nimport dcn_np")
    wanted = r"ImportError: dcn_np needs Python 3\.11 or newer; this is Python 3\.10\.14 \(.+\)"
    assert re.fullmatch(wanted, said)


@pytest.mark.parametrize("file", ["__init__.py", "_requirements.py"])
def test_an_older_python_can_read_as_far_as_the_check(file):
    ast.parse((PACKAGE / file).read_text(), feature_version=(3, 7))


def test_the_check_comes_before_all_other_imports():
    statements = ast.parse((PACKAGE / "__init__.py").read_text()).body
    first, second, *_ = (node for node in statements if isinstance(node, ast.Import | ast.ImportFrom))
    assert [alias.name for alias in first.names] == ["_requirements"]
    assert second.module == "backends"


@pytest.mark.parametrize("old", ["1.25.2", "0.13.0rc1"])
def test_an_older_numpy_is_named(old):
    said = error_of(f"import numpy\nnumpy.__version__ = {old!r}\nimport dcn_np")
    wanted = r"ImportError: dcn_np needs NumPy 1\.26 or newer; this is NumPy {} \(.*numpy\): pip install .*"
    assert re.fullmatch(wanted.format(re.escape(old)), said)


@pytest.mark.parametrize("new", ["1.26.0", "2.0.0rc1", "2.10.0.dev0+git20261125.abc"])
def test_a_newer_numpy_is_taken(new, monkeypatch):
    monkeypatch.setattr("numpy.__version__", new)
    _requirements.check()


@pytest.mark.skipif(not PYPROJECT.exists(), reason="away from the sources")
def test_the_same_versions_are_declared():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert project["requires-python"] == f">={'.'.join(map(str, _requirements.PYTHON))}"
    assert project["dependencies"] == [f"numpy>={'.'.join(map(str, _requirements.NUMPY))}"]


# ---- the extension


@pytest.fixture
def engine(tmp_path):
    """Return the path of the extension in a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "dcn_np", ignore=shutil.ignore_patterns("__pycache__"))
    files = (tmp_path / "dcn_np" / "cpu").glob("_native.*")
    (path,) = (file for file in files if file.name.endswith(tuple(EXTENSION_SUFFIXES)))
    return path


def test_a_tree_that_was_not_built_is_named(engine):
    engine.unlink()
    said = error_of("import dcn_np", engine.parents[2])
    assert said.startswith(
        f"ImportError: {engine.parent} has no engine, _native{EXTENSION_SUFFIXES[-1]}; wanted one for "
    )
    assert said.endswith("Run `make build` in a source tree that was not built, or pip install it")


@pytest.mark.skipif(sys.platform != "linux", reason="changes the header of an ELF file")
@pytest.mark.parametrize(("number", "name"), [(AARCH64, "aarch64"), (SPARC, "machine 2")])
def test_an_extension_for_another_machine_is_named(engine, number, name):
    contents = bytearray(engine.read_bytes())
    contents[MACHINE_OF_AN_ELF_FILE] = number.to_bytes(2, "little")
    engine.unlink()
    engine.write_bytes(contents)
    said = error_of("import dcn_np", engine.parents[2])
    assert said.startswith(f"ImportError: the engine in {engine.parent} cannot be loaded: ")
    assert f"{engine.name} for {name}; wanted one for " in said
    assert "Install the wheel for this machine and this Python" in said


def test_an_extension_for_another_python_is_named(engine):
    other = engine.rename(engine.with_name("_native.cpython-399t-x86_64-linux-gnu.so"))
    said = error_of("import dcn_np", engine.parents[2])
    version = ".".join(map(str, sys.version_info[:3]))
    assert f"cannot be loaded: {other.name}" in said
    assert f"cpython {version}, which loads " in said
