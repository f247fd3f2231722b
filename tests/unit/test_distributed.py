"""Votes, deadlines and messages of align.distributed, with real gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.distributed import Ranks, close, connect, describe
from align.errors import InputError, RunError


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    """What each rank returned or raised, by case."""
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2]), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, str(here.with_name("ranks_scenario.py"))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranks_agree(outcomes: dict[str, list]) -> None:
    everyone = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert outcomes["agree"] == [[everyone, "a", [0, 3]], [everyone, "a", [1, 4]], [everyone, "a", [2]]]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one_refuses", "RanksRefused: read: rank 1: x.jsonl:3: no column"),
        ("all_refuse", "RanksRefused: read: rank 0, 1: x.jsonl:3: no column"),
        ("refusal_and_failure", "RanksFailed: read: rank 0: bad row; read: rank 1: full disk"),
        ("failure_while_the_others_gather", "RanksFailed: hash: rank 0: unreadable"),
        ("different_places", "RanksFailed: the ranks are not at the same place: {0: 'right', 1: 'left'}"),
    ],
)
def test_every_rank_raises_the_same(case: str, message: str, outcomes: dict[str, list]) -> None:
    assert set(outcomes[case]) == {message}


def test_a_bug_is_told_with_its_line_and_once(outcomes: dict[str, list]) -> None:
    first, second = outcomes["bug_in_a_nested_stage"]
    assert first == second
    assert first.startswith("RanksFailed: inner: rank 0: KeyError: 'loss' (") and "ranks_scenario.py:" in first


def test_a_failed_rank_frees_those_that_wait_in_training(outcomes: dict[str, list]) -> None:
    """It leaves after a short wait, its sockets close, and the others' collective ends long before the deadline."""
    waiting, failed = outcomes["failure_while_the_others_train"]
    assert failed == "RanksFailed: train: rank 1: out of memory"
    assert "collective ended in True" in waiting


def test_a_dead_rank_is_named(outcomes: dict[str, list]) -> None:
    assert outcomes["exit_without_a_word"] == [
        "RanksFailed: rank 0 waited for the other ranks at 'end of round': rank 1 is gone (last seen at 'start'). "
        "Run it again.",
        "gone",
    ]


def test_a_wait_has_a_deadline(outcomes: dict[str, list]) -> None:
    assert outcomes["too_slow"] == [
        "RanksFailed: rank 0 waited for the other ranks at 'end of round': rank 1 did not come within 4 s "
        "(last seen at 'start'). Run it again.",
        "slept",
    ]


def test_one_process_needs_no_torch() -> None:
    code = (
        "import sys; from align.distributed import connect, close; import align.store\n"
        "r = connect(); r.barrier('x'); print(r.gather(1), r.broadcast(2), [*r.share(3)]); close(r)\n"
        "print('torch' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[1] 2 [0, 1, 2]\nFalse\n", done.stderr


def test_alone_the_error_itself_is_raised() -> None:
    error = KeyError("x")
    with pytest.raises(KeyError) as caught, Ranks().stage("work"):
        raise error
    assert caught.value is error
    Ranks().vote("work", None)


@pytest.mark.parametrize(("count", "world_size"), [(0, 1), (1, 3), (10, 3), (12, 4)])
def test_shares_cover_everything_once(count: int, world_size: int) -> None:
    shares = [list(Ranks(rank, world_size).share(count)) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "-1")])
def test_a_place_that_makes_no_sense_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}='{value}'"):
        connect()


def test_closing_alone_is_nothing() -> None:
    close(connect())


def test_messages_for_users_have_no_line_numbers() -> None:
    assert describe(RunError("disk full")) == "disk full"
    try:
        raise TypeError("no")
    except TypeError as error:
        assert describe(error).startswith("TypeError: no (") and "test_distributed.py:" in describe(error)
