"""What reaches the screen: who prints, how often, and nothing that could move the cursor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align import progress
from align.progress import Bar, clean, duration, say, track


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[2Jgone\x1b]0;title\x07", "[2Jgone]0;title"),
        ("\x9b31mred", "31mred"),
        ("a\rb\x08\x7f", "ab"),
        ("abc\u202edcba", "abc<U+202E>dcba"),
        ("zero\u200bwidth\ufeff", "zero<U+200B>width<U+FEFF>"),
        ("[/x] [red]markup[/red]", "[/x] [red]markup[/red]"),
        ("half \ud800", "half \\ud800"),
        ("naïve 漢字 🙂", "naïve 漢字 🙂"),
    ],
)
def test_clean(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text())
def test_cleaned_text_holds_no_control_but_newline_and_tab(text: str) -> None:
    cleaned = clean(text)
    assert all(c in "\n\t" or ord(c) >= 32 and not 127 <= ord(c) < 160 for c in cleaned)
    assert clean(cleaned) == cleaned
    cleaned.encode()


def test_plain_lines_come_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with track("sampling", total=12, unit="prompts") as bar:
        for _ in range(12):
            now += 2.0
            bar.advance()
    assert capsys.readouterr().out.splitlines() == [
        "sampling: 3/12 prompts (25%), 0.5 prompts/s, 18 s left",
        "sampling: 6/12 prompts (50%), 0.5 prompts/s, 12 s left",
        "sampling: 9/12 prompts (75%), 0.5 prompts/s, 6 s left",
        "sampling: 12 prompts in 24.0 s, 0.5 prompts/s",
    ]


def test_a_stage_that_fails_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), track("scoring", total=9, unit="responses") as bar:
        bar.advance(4)
        raise KeyError
    assert capsys.readouterr().out.startswith("scoring: stopped at 4/9 responses in ")


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    say("hello")
    with track("x", total=1, unit="y") as bar:
        bar.advance()
    assert bar.done == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    say("hello\x1b[2J")
    assert capsys.readouterr().out == "hello[2J\n"


def test_a_terminal_gets_a_bar_and_keeps_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    with track("sampling [/x]", total=4, unit="prompts") as bar:
        bar.advance(4)
    *bar_shown, closing = capsys.readouterr().out.rstrip().splitlines()
    assert "sampling [/x]: 4 prompts in " in closing and "sampling [/x]" in "".join(bar_shown)


def test_an_empty_stage_divides_by_nothing() -> None:
    assert Bar("x", 0, "y").line().startswith("x: 0/0 y, ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (7300, "2 h 1 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
