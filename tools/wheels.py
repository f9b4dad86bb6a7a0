"""Build every wheel that an x86-64 Debian 12 can, and try each where there is nothing but Python and NumPy.

Each root holds Debian's own Python, and what pip installs with the wheel: no compiler, no OpenMP, nothing of
the machine that built it. `unshare` gives whoever runs this a root of their own: no one needs to be root.
"""

import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import aarch64
from check_distribution import ROOT, run, wheel

PYTHON = ["python3.11-minimal", "libpython3.11-stdlib", "libstdc++6"]  # the last is NumPy's
PACKAGES = "usr/lib/python3/dist-packages"  # where Debian's Python looks
# Of the root that the wheel for ARM is linked in, but not of one to run it.
NOT_PYTHON = "libgomp*", "include"
MOUNTED = 'mount --rbind /proc "$0/proc" && exec chroot "$0" "$@"'
# That there is no OpenMP is an error here.
DOCTOR = "/usr/bin/python3.11", "-W", "error::RuntimeWarning", "-m", "dcn_np", "doctor"


def x86_64_system():
    """Return a folder with Python for this machine and all that it needs."""
    folder = ROOT / "build" / "x86_64" / "system"
    aarch64.unpack(PYTHON, folder, architecture="amd64")
    return folder


@contextmanager
def empty_root(system, path):
    """Make a root of Python, NumPy and a wheel."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        shutil.copytree(system, root, symlinks=True, ignore=shutil.ignore_patterns(*NOT_PYTHON))
        (root / "proc").mkdir(exist_ok=True)
        run(*aarch64.pip("install", machine_of(path)), "--no-compile", "--target", root / PACKAGES, path)
        shared = [each for each in root.rglob("libgomp*") if not each.is_relative_to(root / PACKAGES)]
        assert not shared, f"the root has more than Python: {shared}"
        yield root


def try_out(path, system, emulator=None):
    """Let a wheel examine itself in an empty root."""
    with empty_root(system, path) as root:
        if emulator:
            shutil.copy(emulator, root / "emulator")
        command = ["/emulator", *DOCTOR] if emulator else DOCTOR
        unshare = "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNTED
        run(*unshare, root, *command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})


def refused(path, machine, version):
    """Check that pip does not install a wheel for another machine or an older Python."""
    command = [*aarch64.pip("install", machine, version), "--no-deps", "--dry-run", "--target", "none", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode, f"pip takes {path.name} for {machine} and Python {version}"
    assert "is not a supported wheel on this platform" in done.stderr, done.stderr
    print(f"{path.name}: not for {machine} with Python {version}, says pip")


def machine_of(path):
    """Return the machine that a wheel is for."""
    return path.stem.split("-")[-1].split("_", 3)[-1]


def wheels():
    """Build, check and try all; the paths of the wheels."""
    system = aarch64.system(), aarch64.tools() / "usr/bin/qemu-aarch64-static"
    built = {wheel(): (x86_64_system(),), aarch64.wheel(): system}
    for path, where in built.items():
        try_out(path, *where)
        (other,) = {"x86_64", "aarch64"} - {machine_of(path)}
        refused(path, other, "3.11")
        refused(path, machine_of(path), "3.10")
    return "\n".join(map(str, built))


if __name__ == "__main__":
    print(wheels())
