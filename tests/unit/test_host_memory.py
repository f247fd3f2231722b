"""Freed memory is kept: the same large blocks again cost no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from align.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("absent")
    sys.exit()
def step():
    blocks = [torch.ones(2_000_000) for _ in range(6)]  # 8 MB each
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **extra: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | extra
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_blocks_come_back_without_page_faults() -> None:
    found = faults("keep")
    if found == "absent":
        pytest.skip("not glibc")
    assert int(found) < 200  # 6 blocks of 8 MB are 11,700 pages a step
    assert int(faults("plain")) >= int(found)  # thousands, unless this machine's kernel or settings keep them anyway


def test_a_users_own_setting_stays() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") == "absent"
