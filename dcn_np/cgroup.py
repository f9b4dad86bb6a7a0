"""The processor time that the control groups of this process allow: what a container may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the least quota of the process's groups and their ancestors, in CPUs; None without one.

    Versions 1 and 2 of control groups are read, also side by side.
    """
    quotas = [quota for folder in _folders(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(root: Path) -> Iterator[Path]:
    """List the groups that may bound this process: its own and their ancestors, up to the mount."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (mount / "cpu", mount / controllers) if controllers else (mount, mount / "unified"):
            group = base / path.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base))


def _quota(folder: Path) -> float | None:
    limits = _text(folder / "cpu.max").split() or [
        _text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    quota, period = limits
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
