"""What the compiled code may contain: read from the object files with nm, objdump and readelf."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dcn_np.cpu import _native, _openmp

ROOT = Path(__file__).parent.parent
BUILD = runpy.run_path(str(ROOT / "setup.py"))
OBJECTS = ROOT / BUILD["OBJECTS"] / "src"
ISAS = list(BUILD["instruction_sets"]())

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils"),
]


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(file, *options):
    """List (type letter, demangled name) of a file's symbols."""
    lines = run("nm", "-C", *options, str(file)).splitlines()
    return re.findall(r"^(?:[0-9a-f]+)?\s+([A-Za-z]) (.+)$", "\n".join(lines), re.MULTILINE)


def object_of(isa):
    file = OBJECTS / "isa" / f"{isa}.o"
    if not file.exists():
        pytest.skip("the extension was not built from this folder")
    return file


@pytest.fixture(params=ISAS)
def isa_object(request):
    return request.param, object_of(request.param)


def test_weak_symbols_of_an_instruction_set_are_its_own(isa_object):
    # Of equal weak symbols the linker keeps one: AVX-512 code would run on every machine.
    isa, file = isa_object
    weak = [name for letter, name in symbols(file) if letter in "WwVvu" and name != "_GLOBAL_OFFSET_TABLE_"]
    assert [name for name in weak if f"dcn::{isa}::" not in name] == []


def test_an_instruction_set_defines_what_it_should(isa_object):
    isa, file = isa_object
    defined = [name for letter, name in symbols(file) if letter not in "Uw"]
    assert f"dcn::{isa}::kKernels" in defined


def test_an_instruction_set_exports_nothing_of_another(isa_object):
    isa, file = isa_object
    defined = symbols(file, "--extern-only", "--defined-only")
    exported = [name for letter, name in defined if letter not in "WVu"]
    assert [name for name in exported if f"dcn::{isa}::" not in name] == []


def test_an_instruction_set_needs_no_standard_library(isa_object):
    _, file = isa_object
    needed = [name for letter, name in symbols(file) if letter == "U"]
    library = r"std::|operator (new|delete)|__cxa|_Unwind|omp_"
    assert [name for name in needed if re.search(library, name)] == []


def test_an_instruction_set_runs_nothing_at_load_and_keeps_no_state(isa_object):
    _, file = isa_object
    found = symbols(file)
    assert [name for letter, name in found if letter in "bB" or "guard variable" in name] == []
    assert [name for _, name in found if "_GLOBAL__sub_I" in name or "__static_initialization" in name] == []
    assert ".init_array" not in run("readelf", "--section-headers", "--wide", str(file))


# Registers that show which instructions a file uses: ymm of AVX, zmm of AVX-512.
REGISTERS = {"baseline": set(), "avx2": {"ymm"}, "avx512": {"zmm"}}


@pytest.mark.skipif(BUILD["machine"]() != "x86_64", reason="the register names are those of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_an_instruction_set_uses_its_registers(isa_object):
    isa, file = isa_object
    used = set(re.findall(r"%([yz]mm)\d", run("objdump", "--disassemble", "--no-show-raw-insn", str(file))))
    assert used >= REGISTERS[isa]
    assert used <= REGISTERS[isa] | ({"ymm"} if isa == "avx512" else set())


@pytest.mark.skipif(BUILD["machine"]() != "x86_64", reason="the register names are those of x86-64")
@pytest.mark.parametrize("name", ["dispatch.o", "parallel.o", "memory.o"])
def test_what_every_machine_runs_uses_no_vector_extension(name):
    object_of("baseline")
    assert not re.search(r"%[yz]mm\d", run("objdump", "--disassemble", str(OBJECTS / name)))


@pytest.mark.parametrize("extension", [_native, _openmp], ids=["_native", "_openmp"])
def test_an_extension_exports_its_init_function_only(extension):
    defined = symbols(extension.__file__, "--dynamic", "--defined-only")
    exported = [name for letter, name in defined if letter in "TDB"]
    assert exported == [f"PyInit_{extension.__name__.rpartition('.')[2]}"]


def test_the_engine_needs_no_openmp():
    assert "libgomp" not in run("readelf", "--dynamic", _native.__file__)
    assert "libgomp" in run("readelf", "--dynamic", _openmp.__file__)


def test_the_extension_does_not_touch_the_floating_point_mode():
    # crtfastmath.o comes with -ffast-math at the link: loading the library would flush denormals everywhere.
    assert [name for _, name in symbols(_native.__file__) if "fast_math" in name] == []
    flags = [flag for isa_flags in BUILD["instruction_sets"]().values() for flag in isa_flags]
    everywhere = [*flags, *BUILD["COMMON_FLAGS"], *BUILD["RELEASE_FLAGS"]]
    forbidden = {"-Ofast", "-ffast-math", "-ffinite-math-only", "-funsafe-math-optimizations"}
    assert not forbidden & set(everywhere)


def test_the_extension_has_no_debug_information():
    if BUILD["SANITIZERS"]:
        pytest.skip("a sanitizer build keeps it")
    assert ".debug_info" not in run("readelf", "--section-headers", "--wide", _native.__file__)
