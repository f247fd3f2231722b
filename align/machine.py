"""What this machine has: devices, memory and disk, as one rank may use them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Memory is in bytes.  On a CPU the device is the host, split evenly over the ranks that run here.

    Example: Machine(kind="cuda", name="NVIDIA H100", devices=8, local_ranks=8, device_bytes=85_017_493_504,
    device_free=84_000_000_000, host_bytes=270_000_000_000, host_free=250_000_000_000)
    """

    kind: str  # "cuda" or "cpu"
    name: str
    devices: int  # GPUs of this machine; 0 without one
    local_ranks: int  # ranks that share this machine
    device_bytes: int  # memory of one rank's device
    device_free: int  # of it, not in use now
    host_bytes: int  # one rank's share of main memory
    host_free: int  # one rank's share of what is free now
    here: bool = True  # False for a machine that is only planned for: nothing is known of its disk


def find_machine(ranks: int) -> Machine:
    """This machine.  With GPUs each rank takes one; torchrun's LOCAL_WORLD_SIZE says how many ranks are here."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    limit = min(memory.total, container_limit() or memory.total)
    free = min(memory.available, limit)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or (min(ranks, devices) if devices else ranks))
    host, host_free = limit // here, free // here
    if not devices:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        return Machine("cpu", f"CPU, {cores} cores", 0, here, host, host_free, host, host_free)
    readings = [torch.cuda.mem_get_info(i) for i in range(devices)]
    return Machine(
        kind="cuda",
        name=torch.cuda.get_device_name(0),
        devices=devices,
        local_ranks=here,
        device_bytes=min(total for _, total in readings),
        device_free=min(free_now for free_now, _ in readings),
        host_bytes=host,
        host_free=host_free,
    )


def imagined(ranks: int, gpu_gib: float, host_gib: float) -> Machine:
    """A machine with a GPU of this memory for each rank, and this much main memory shared by all of them."""
    device, host = int(gpu_gib * 2**30), int(host_gib * 2**30) // ranks
    name = f"GPUs of {gpu_gib:g} GiB, as asked"
    return Machine("cuda", name, ranks, ranks, device, device, host, host, here=False)


def container_limit() -> int | None:
    """Memory limit of this process's control group in bytes (version 2, then 1); None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", name)
        if path.is_file():
            text = path.read_text().strip()
            if text.isdigit():
                return int(text)
    return None


def free_disk(directory: Path) -> int:
    """Free bytes on the disk that `directory` is on, or will be on once it is made."""
    place = directory.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
