"""One rank: `python -m align.worker JOB`, started by `align.launcher` and by nobody else.

The order matters.  First the tie to the launcher, so that a rank never outlives it; then the environment; only then
the code that imports torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from align.errors import AlignError
from align.launcher import apply_environment, rank_environment, verb_function
from align.recipe import Recipe

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(job_file: str) -> int:
    """Runs the job's verb on this rank; an error goes into a report for the launcher, which prints one of them."""
    job = json.loads(Path(job_file).read_text())
    die_with(job["launcher"])
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, signal.SIG_DFL)  # what is committed is safe, so a rank that is told to stop just stops
    rank = int(os.environ["RANK"])
    apply_environment(rank_environment(int(os.environ["LOCAL_WORLD_SIZE"])))
    recipe = Recipe.model_validate(job["recipe"])
    try:
        return verb_function(job["function"])(recipe, job["verb"], job["round"])
    except AlignError as error:
        message, exit_code = str(error), error.exit_code
    except Exception:
        message, exit_code = f"rank {rank} stopped at an error in the program:\n{traceback.format_exc()}", 1
    report = {"rank": rank, "message": message, "exit_code": exit_code, "time": time.time()}
    Path(job_file).with_name(f"rank{rank}.json").write_text(json.dumps(report))
    return exit_code


def die_with(launcher: int) -> None:
    """Asks Linux to kill this process when its launcher dies, and dies now if that has happened already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
