"""Build for 64-bit ARM and test there, from an x86-64 Debian 12: ``aarch64.py {wheel,test}``.

Debian's cross compiler, its Python for arm64 and QEMU are unpacked below build/aarch64: nothing is
installed, and no one needs to be root. QEMU's user mode runs a program, not a machine: what it computes
counts, how fast does not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from check_distribution import ROOT, portable_wheel, run

HOME = ROOT / "build" / "aarch64"
WHEEL_BYTES = 1_000_000
TRIPLET = "aarch64-linux-gnu"

TOOLS = ["g++-aarch64-linux-gnu", "qemu-user-static"]
# What a compiler for this machine has already, of whichever version: another one would take its place.
THERE = ("libc6_", "libc-bin_")
SYSTEM = ["python3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev", "libgomp1", "libstdc++6"]
PACKAGES = ["numpy", "ml_dtypes", "pytest", "hypothesis"]
GLIBC_MINORS = range(17, 37)  # up to Debian 12's

# Tests that need neither a compiler nor a process of their own, which QEMU would have to be asked for; the
# reference, which is NumPy alone, is tested elsewhere.
TESTS = ["test_semantics.py", "test_gradients.py", "test_arguments.py", "test_fuzz.py"]
TESTS += ["test_roi_semantics.py", "test_roi_arguments.py", "test_halves.py"]
LEFT_OUT = "emulated or reference or process or mypy or until_ml_dtypes"
FUZZ_CASES = 100


def unpack(packages, folder, architecture=None, without=()):
    """Download Debian packages with all that they depend on, and unpack them in a folder."""
    if folder.exists():
        return
    if not shutil.which("apt-get"):
        raise SystemExit("apt-get is needed, which downloads Debian's packages")
    with tempfile.TemporaryDirectory() as temporary:
        apt = ["apt-get", "-qq", "-o", f"Dir::State={temporary}", "-o", f"Dir::Cache={temporary}"]
        apt += ["-o", "Dir::State::status=/dev/null", "-o", "Debug::NoLocking=1"]
        if architecture:
            apt += ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"]
        for name in ("lists/partial", "archives/partial"):
            (Path(temporary) / name).mkdir(parents=True)
        run(*apt, "update")
        run(*apt, "install", "--yes", "--no-install-recommends", "--download-only", *packages)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for package in sorted((Path(temporary) / "archives").glob("*.deb")):
            if not package.name.startswith(without):
                contents = subprocess.run(
                    ["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True
                )
                # Packages that put files below /lib find a link to /usr/lib there.
                run("tar", "-x", "--keep-directory-symlink", "-C", partial, input=contents.stdout)
        partial.rename(folder)


def tools():
    """Return the folder with the cross compiler and QEMU."""
    folder = HOME / "tools"
    unpack(TOOLS, folder, without=THERE)
    return folder


def compilers():
    """Return the environment in which setup.py builds for aarch64."""
    # Debian's own pyconfig.h includes that of the machine built for; all else comes from elsewhere first.
    headers = f"-idirafter {system()}/usr/include"
    compiler = f"{tools()}/usr/bin/{TRIPLET}-%s --sysroot={tools()} {headers}"
    return os.environ | {
        "CC": compiler % "gcc",
        "CXX": compiler % "g++",
        "LD_LIBRARY_PATH": f"{tools()}/usr/lib/x86_64-linux-gnu",  # of the assembler and the linker
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }


def system():
    """Return the folder with Python for arm64, its headers, and the libraries that it needs, libgomp too."""
    folder = HOME / "system"
    unpack(SYSTEM, folder, architecture="arm64")
    return folder


def wheel():
    """Build the wheel, bundle libgomp, and check what is inside; the path of the wheel."""
    libraries = f"{system()}/usr/lib/{TRIPLET}:{system()}/lib/{TRIPLET}"
    return portable_wheel(WHEEL_BYTES, libraries, env=compilers())


def test(*arguments):
    """Run the tests: the assembly's on this machine, the others on the emulated one."""
    environment = compilers()
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/aarch64"),
        cwd=ROOT,
        env=os.environ
        | {"DCN_NP_TEST_AARCH64": environment["CXX"], "LD_LIBRARY_PATH": environment["LD_LIBRARY_PATH"]},
    )
    packages = site(wheel())
    with tempfile.TemporaryDirectory() as folder:
        # Away from the sources, whose package is for this machine.
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        emulated = {"PYTHONPATH": str(packages), "DCN_NP_FUZZ_CASES": str(FUZZ_CASES)}
        options = [option for name, value in emulated.items() for option in ("-E", f"{name}={value}")]
        emulator = tools() / "usr/bin/qemu-aarch64-static"
        command = [emulator, *options, "-L", system(), system() / "usr/bin/python3.11"]
        wanted = arguments or [f"tests/{name}" for name in TESTS]
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=quick"]
        run(*command, *pytest, "-k", f"not ({LEFT_OUT})", *wanted, cwd=folder)


def pip(command, machine, version="3.11"):
    """Return the beginning of a command of pip for a Python on Debian 12, which need not be this one."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS] + [f"manylinux2014_{machine}"]
    platforms = [option for tag in tags for option in ("--platform", tag)]
    start = sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"
    return *start, "--python-version", version, "--only-binary", ":all:", *platforms


def site(path):
    """Return a folder with the packages that tests need, and the wheel."""
    packages = HOME / "site"
    if not packages.exists():
        partial = packages.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            run(*pip("download", "aarch64"), "--dest", folder, *PACKAGES)
            for package in Path(folder).glob("*.whl"):
                zipfile.ZipFile(package).extractall(partial)
        partial.rename(packages)
    for old in packages.glob("dcn_np*"):
        shutil.rmtree(old)
    zipfile.ZipFile(path).extractall(packages)
    return packages


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print({"wheel": wheel, "test": test}[command](*arguments) or "passed")
