"""The command line from outside: exit status, no traceback, and how long an answer takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERBS = ("run", "plan", "sample", "score", "pair", "train", "evaluate", "export", "verify", "doctor", "schema")
BLOCK_HEAVY = """
import sys
for name in ("torch", "vllm", "deepspeed", "trl", "peft", "transformers", "datasets"):
    sys.modules[name] = None
from align.cli import main
main()
"""


def align(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`align …` in a process where the heavy packages cannot be imported: an answer must not need them."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK_HEAVY, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_help_names_every_verb(tmp_path: Path) -> None:
    done = align("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.split()]
    assert [verb for verb in listed if verb in VERBS] == list(VERBS)


@pytest.mark.parametrize("verb", VERBS[:8])
def test_a_wrong_recipe_exits_2_with_one_line_per_error_and_no_traceback(verb: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\npolicy: {modl: m}\nverifiers: [{kind: noise, name: n, rate: 2}]\n")
    done = align(verb, "x.yaml", "--ranks", "2", "seed=-1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "x.yaml:2:10: policy.modl: unknown key, did you mean model?",
        "x.yaml:3:36: verifiers.0.rate: must be at most 1, not 2",
        "command line: seed: must be at least 0, not -1",
    ]


def test_hostile_text_in_a_recipe_does_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text('name: "\\e]0;owned\\a"\n"\\e[2J\\u202e": 1\npolicy: "\\e[31m"\n')
    done = align("run", "x.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert not any(c in done.stderr for c in "\x1b\x07\u202e")


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("run", "missing.yaml"), ("run", "x.yaml", "--ranks", "two"), ("nonsense",), ("run", "x.yaml", "--no")],
)
def test_misuse_exits_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\npolicy: {model: m}\nverifiers: [{kind: noise, name: n}]\n")
    done = align(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr


def test_no_rank_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\npolicy: {model: m}\nverifiers: [{kind: noise, name: n}]\n")
    done = align("run", "x.yaml", "--ranks", "0", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "--ranks 0: give at least 1\n")


def test_schema_is_json(tmp_path: Path) -> None:
    done = align("schema", cwd=tmp_path)
    assert json.loads(done.stdout)["properties"]["training"] and done.returncode == 0


def test_answers_come_quickly(tmp_path: Path) -> None:
    """The targets are 0.5 s for help and 1.5 s for a recipe error; the bounds leave room for a busy machine."""
    (tmp_path / "x.yaml").write_text("name: 3\n")
    for arguments, bound_s in ((("--help",), 5), (("run", "x.yaml"), 10)):
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            align(*arguments, cwd=tmp_path)
            seconds.append(time.monotonic() - began)
        print(f"align {' '.join(arguments)}: {min(seconds):.2f} s")
        assert min(seconds) < bound_s
