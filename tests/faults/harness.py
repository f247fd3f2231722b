"""Starts, kills and resumes the small run of `store_scenario`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Runs:
    """A process that forks runs on demand; see store_scenario."""

    def __init__(self, *, torch: bool = False) -> None:
        command = [sys.executable, str(HERE / "store_scenario.py"), *(["torch"] if torch else [])]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["PYTHONPATH"] = str(HERE.parents[1])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def begin(self, directory: Path, **order: Any) -> None:
        """Start a run without waiting for its end."""
        assert self.process.stdin is not None
        whole = {"directory": str(directory), "environment": {}, "ranks": 1, **order}
        self.process.stdin.write(json.dumps(whole) + "\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """The outcome of the run begun last."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def go(self, directory: Path, **order: Any) -> dict[str, Any]:
        """Start a run and wait for its end."""
        self.begin(directory, **order)
        return self.end()

    def close(self) -> None:
        """End the forking process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
