"""Every compilation of the GPU's kernels: it compiles, within the limits of the hardware; and its cache."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from calls import environment, python

from dcn_np.cuda import fused, modules, nvrtc

try:
    nvrtc.nvrtc()
except ImportError:
    # Where NVIDIA has packages its compiler is one of the test's requirements.
    if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64"):
        raise
    pytest.skip("no NVRTC for this platform", allow_module_level=True)

ARCHITECTURES = [int(name) for name in os.environ.get("DCN_NP_TEST_ARCHITECTURES", "80,90").split(",")]

# Shared memory that a kernel may have without asking for more, and the registers of a multiprocessor.
MOST_SHARED = 48 * 1024
REGISTERS = 65536

MODULES = [*modules.every_plain_module(), *fused.every_module()]


def name_of(module):
    return "-".join([module.source.removesuffix(".cu"), *(value for _, value in module.defines)])


def resources(log):
    """Map each kernel of a log of ptxas to registers, bytes spilled, and bytes of static shared memory."""
    found = {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part).group(1)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        found[name] = registers, spills, int(shared.group(1)) if shared else 0
    return found


def threads_of(module):
    """Map each kernel of a source to the threads per block that it promises."""
    texts = modules._texts()
    source = texts[module.source]
    included = [texts[name] for name in re.findall(r'#include "(\S+)"', source)]
    text = re.sub(r"\n\s*", " ", "".join([source, *included]))
    constants = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    size = {name: int(value) for name, value in module.defines if value.isdigit()}
    if "DCN_BM" in size:
        warps = size["DCN_BM"] // size["DCN_WM"] * (size["DCN_BN"] // size["DCN_WN"])
        constants["kThreads"] = 32 * warps
    bounds = re.findall(r"__global__ void __launch_bounds__\((\w+)(?:, \d+)?\)\s+(\w+)\(", text)
    return {name: int(constants.get(threads, threads)) for threads, name in bounds}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_every_module_compiles_and_spills_nothing(module, architecture):
    if architecture < module.least_architecture:
        pytest.skip("not for this architecture")
    cubin, log = modules.compile_module(module, architecture, "--ptxas-options=-v")
    assert cubin.startswith(b"\x7fELF")
    kernels, threads = resources(log), threads_of(module)
    assert set(kernels) == set(threads)
    for name, (registers, spilled, shared) in kernels.items():
        assert spilled == 0, name
        assert registers * threads[name] <= REGISTERS, name
        assert shared <= MOST_SHARED, name


def test_every_source_is_in_the_list():
    folder = Path(modules.__file__).parent.parent / "kernels"
    assert {module.source for module in MODULES} == {file.name for file in folder.glob("*.cu")}
    assert len(set(MODULES)) == len(MODULES)


# ---- the compiler


def test_what_does_not_compile_raises_with_the_log():
    with pytest.raises(RuntimeError, match=r"(?s)wrong\.cu does not compile with -arch=sm_80.*nonsense"):
        nvrtc.nvrtc().compile("wrong.cu", "nonsense", {}, ["-arch=sm_80"])


def test_headers_are_found_by_name():
    text = '#include "one.hpp"\nextern "C" __global__ void k(int* to) { *to = VALUE; }'
    cubin, _ = nvrtc.nvrtc().compile("k.cu", text, {"one.hpp": "#define VALUE 1"}, ["-arch=sm_80"])
    assert cubin.startswith(b"\x7fELF")


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    nvrtc.nvrtc.cache_clear()
    try:
        with pytest.raises(ImportError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc.nvrtc()
    finally:
        nvrtc.nvrtc.cache_clear()


def test_an_unknown_architecture_is_named():
    with pytest.raises(RuntimeError, match=r"this GPU has 3\.5: .*cuda12"):
        modules.compile_module(MODULES[0], 35)
    with pytest.raises(RuntimeError, match=r"this GPU has 99\.0: a newer"):
        modules.compile_module(MODULES[0], 990)


def test_a_newer_device_runs_the_code_of_the_newest_known_one():
    compiler = types.SimpleNamespace(architectures=(75, 80, 86, 90), version=(13, 0))
    assert [modules._known(compiler, architecture) for architecture in (75, 80, 87, 89, 90, 91)] == [
        *(75, 80, 86, 86, 90, 90)
    ]


# ---- the cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DCN_NP_CACHE_DIR", str(folder))
    modules.cache_folder.cache_clear()
    yield folder
    modules.cache_folder.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The modules compiled from now on; compiling costs nothing and gives a few bytes."""
    compiled = []

    def compile_module(module, architecture, *more):
        compiled.append((module, architecture))
        return b"\x7fELF" + repr(module).encode(), ""

    monkeypatch.setattr(modules, "compile_module", compile_module)
    return compiled


def test_a_module_is_compiled_once(cache, compilations):
    paths = [modules.cubin_path(MODULES[0], 80) for _ in range(3)]
    assert len(set(paths)) == len(compilations) == 1
    assert paths[0].parent == cache
    assert paths[0].read_bytes().startswith(b"\x7fELF")
    assert paths[0].stat().st_mode & 0o077 == 0


def test_all_that_decides_the_code_is_in_the_key(monkeypatch, cache, compilations):
    paths = {modules.cubin_path(module, architecture) for module in MODULES[:3] for architecture in (80, 90)}
    assert len(paths) == 6
    monkeypatch.setattr(modules.nvrtc(None), "version", (99, 0))
    paths.add(modules.cubin_path(MODULES[0], 80))
    monkeypatch.setattr(modules, "_texts", lambda: {**texts, "scalar.hpp": texts["scalar.hpp"] + "\n"})
    paths.add(modules.cubin_path(MODULES[0], 80))
    assert len(paths) == len(compilations) == 8


texts = modules._texts()


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "cut off", "gone"])
def test_a_damaged_file_is_compiled_again(cache, compilations, damage):
    path = modules.cubin_path(MODULES[0], 80)
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert modules.cubin_path(MODULES[0], 80).read_bytes() == whole
    assert len(compilations) == 2


@pytest.mark.parametrize("broken", ["a file", "open to others"])
def test_a_folder_that_cannot_be_trusted_is_replaced_by_a_private_one(cache, compilations, broken):
    if broken == "a file":
        cache.write_text("")
    else:
        cache.mkdir()
        cache.chmod(0o777)
    path = modules.cubin_path(MODULES[0], 80)
    assert path.read_bytes()
    assert path.parent != cache
    assert path.parent.stat().st_mode & 0o077 == 0


COMPILE = """
from dcn_np.cuda import modules
print(modules.cubin_path(next(modules.every_plain_module()), 80))
"""


def test_a_user_without_a_home_gets_a_private_folder(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError(
            "Could not determine home directory."
        )  # as for a user whom the system does not know

    monkeypatch.setattr(modules.Path, "home", home)
    assert modules.cache_folder() == cache
    monkeypatch.delenv("DCN_NP_CACHE_DIR")
    modules.cache_folder.cache_clear()
    assert modules.cache_folder().stat().st_mode & 0o077 == 0


def test_several_processes_compile_at_once(cache):
    variables = environment(DCN_NP_CACHE_DIR=str(cache))
    running = [
        subprocess.Popen([sys.executable, "-c", COMPILE], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {process.communicate(timeout=120)[0] for process in running}
    assert len(paths) == 1
    assert {process.returncode for process in running} == {0}
    assert sorted(file.suffix for file in cache.iterdir()) == [".cubin", ".sha256"]


def test_importing_the_backend_needs_neither_cupy_nor_nvrtc():
    code = "import sys, dcn_np.cuda; print('cupy' in sys.modules, dcn_np.cuda.dtypes()[0])"
    assert python(code) == "False float32"
