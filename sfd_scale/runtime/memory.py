"""How much memory this machine has left, to refuse a size before the memory is taken."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int | None:
    """Bytes that this process may still take: of the machine, or of its container; None if that is unknown."""
    found = []
    if _MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for limit, used in _CGROUPS:
        try:
            # The limit is `max` if there is none.
            found.append(int(Path(limit).read_text(encoding="utf-8")) - int(Path(used).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def require_memory(size: int, what: str, advice: str) -> None:
    """Refuse a size that this machine has no memory for.

    Args:
        size: bytes.

    Raises:
        ValueError: `what` needs more memory than is available; `advice` says what to do.
    """
    available = available_memory()
    if available is not None and size > available:
        raise ValueError(
            f"{what} needs {size / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are available; {advice}"
        )
