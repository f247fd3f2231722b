"""Small verbs for test_launcher.py.  As a program: `launcher_verbs.py VERB RANKS DIRECTORY`, ended like `align`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from align.errors import InputError, RunError
from align.recipe import Recipe


def note(recipe: Recipe, **facts: object) -> None:
    """Leaves this rank's process id and what else it has to say, complete or not at all."""
    file = Path(recipe.output_dir, f"{os.environ['RANK']}.json")
    file.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid(), **facts}))
    file.with_suffix(".tmp").rename(file)


def listen(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """Joins the ranks, for real, and says who listens where."""
    import psutil

    from align import distributed

    ranks = distributed.connect()
    if ranks.world_size == 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    found = [os.getpid(), *([os.getppid()] if ranks.world_size > 1 else [])]
    places = [list(c.laddr) for pid in found for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
    note(recipe, places=places, verb=verb, round=round_index, environment=dict(os.environ), everyone=ranks.gather(1))
    if ranks.world_size == 1:
        dist.destroy_process_group()
    distributed.close(ranks)
    return 0


def refuse(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """One rank finds the input wrong while the others work."""
    note(recipe)
    if os.environ["RANK"] == "1":
        raise InputError("questions.jsonl:3: prompt: is missing")
    time.sleep(600)
    return 0


def refuse_together(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """What a failure vote does: every rank raises the same."""
    raise RunError("disk full: /there, 5 bytes needed, 3 free")


def stumble(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """A bug on every rank."""
    raise KeyError("oops")


def wait(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """Works for ever."""
    note(recipe)
    time.sleep(600)
    return 0


def status(recipe: Recipe, verb: str, round_index: int | None) -> int:
    """Ends with a status of its own."""
    return 0


if __name__ == "__main__":
    from align import cli
    from align.launcher import launch

    name, count, directory = sys.argv[1:]
    fields = {"name": "t", "policy": {"model": "m"}, "verifiers": [{"kind": "noise", "name": "n"}]}
    tiny = Recipe.model_validate({**fields, "output_dir": directory})

    def app() -> None:
        """In place of the verbs of `align`."""
        sys.exit(launch(tiny, "sample", 7, int(count) or None, f"launcher_verbs:{name}"))

    cli.app = app  # type: ignore[assignment]
    cli.main()
