"""The memory that a run may use: the GPU's, the machine's or the container's."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

USED = 0.9
"""Share of the free memory that a run plans to use."""
_V1_UNLIMITED = 2**60  # cgroup v1 has no value for "unlimited"


@dataclass(frozen=True)
class Machine:
    """The memory that one of the run's processes may use."""

    device: str  # "cpu" or "cuda"
    free: float  # bytes
    what: str  # description, for messages

    @property
    def budget(self) -> float:
        return USED * self.free


def machine() -> Machine:
    """The memory of the device, the machine or the container, divided among the run's processes there."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        share = -(-local // torch.cuda.device_count())
        return Machine("cuda", torch.cuda.mem_get_info()[0] / share, "free on the GPU")
    taken = psutil.Process().memory_info().rss  # `memory.PROCESS` counts it
    free, what = psutil.virtual_memory().available, "of memory free"
    limit = cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if limit is not None and limit < free:
        free, what = limit, "free in this container"
    if local > 1:
        what += f", shared by {local} processes"
    return Machine("cpu", free / local + taken, what)


def print_once(text: str) -> None:
    """Print, in the first of the run's processes on this machine only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text)


def cgroup_free(own: Path, root: Path) -> int | None:
    """Bytes left by the tightest cgroup limit above this process; None = no limit. Cached files count as free."""
    frees = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            version = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        base = root / "memory" if controllers else root
        inside = Path(path.lstrip("/"))
        for directory in (base / inside, *(base / parent for parent in inside.parents)):
            frees += _free_in(directory, *version)
    return min(frees, default=None)


def _free_in(directory: Path, limit: str, usage: str, cached: str) -> list[int]:
    try:
        limit_text = (directory / limit).read_text().strip()
        used = int((directory / usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit_text == "max" or int(limit_text) > _V1_UNLIMITED:
        return []
    return [max(0, int(limit_text) - used + int(stat.get(cached, 0)))]
