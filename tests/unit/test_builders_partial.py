"""Partly-correct solutions: states, how far a response is right, the buffer, and the pairs, all by hand."""

from __future__ import annotations

from align.builders.partial import Partial, buffer, partly_correct, states, steps_right
from align.builders.per_step import Candidates
from align.builders.steps import Stepped, cut
from align.recipe_steps import Steps
from align.records import Sample, Score

COLUMN = r":([0-9])(c[0-9])?"
ALPHABET = "0123456789+:c=,"


def solve(text: str, name: str, end: bool = True) -> Stepped:
    """A solution in columns; token 15 is the end of sequence."""
    ids = tuple(ALPHABET.index(c) for c in text) + ((15,) if end else ())
    sample = Sample(name, "p", 0, 0, 0, (0,), ids, (-1.0,) * len(ids), text, "stop", 1.0, 1.0, 0, 40)
    return cut(sample, Steps(separator=","), lambda i: "".join(ALPHABET[k] if k < 15 else "" for k in i))


RIGHT = solve("3+8:1c1,2+5+1:8,1+4:5,=581", "right")
OTHER_ORDER = solve("8+3:1c1,5+2+1:8,1+4:6,=681", "swapped")  # the same states in other words, then a wrong column
NO_CARRY = solve("3+8:1,2+5:7,1+4:5,=571", "nocarry")
LAST = solve("3+8:1c1,2+5+1:8,1+4:5,=518", "last")
MIDDLE = solve("3+8:1c1,2+5+1:9,1+4:5,=591", "middle")


def test_states_hold_digits_and_carries() -> None:
    assert states(RIGHT, COLUMN) == [("1c1",), ("1c1", "8"), ("1c1", "8", "5"), ("1c1", "8", "5", "=581")]
    assert states(RIGHT, None)[0] == ("3+8:1c1,",)
    assert states(RIGHT, "c|:")[1] == (":", ":")  # a pattern without a group gives what it matched


def test_how_far_each_is_right() -> None:
    reached = set(states(RIGHT, COLUMN))
    found = {r.sample.id: steps_right(r, reached, COLUMN) for r in (OTHER_ORDER, NO_CARRY, LAST, MIDDLE, RIGHT)}
    assert found == {"swapped": 2, "nocarry": 0, "last": 3, "middle": 1, "right": 3}
    assert steps_right(OTHER_ORDER, set(states(RIGHT, None)), None) == 0  # as text, nothing matches


def test_the_buffer_keeps_no_beginning_of_what_it_has() -> None:
    partials = [Partial(OTHER_ORDER, 2), Partial(OTHER_ORDER, 1), Partial(MIDDLE, 1), Partial(NO_CARRY, 0)]
    assert [(p.response.sample.id, p.right) for p in buffer(partials, [])] == [("swapped", 2), ("middle", 1)]
    kept = buffer(partials, [RIGHT.sample.response_ids])  # "middle" begins as the correct one does
    assert [(p.response.sample.id, p.right) for p in kept] == [("swapped", 2)]


def test_the_pairs_and_their_numbers() -> None:
    wrong = [NO_CARRY, OTHER_ORDER, LAST]
    samples = {r.sample.id: r.sample for r in (RIGHT, *wrong)}
    out = Candidates()
    partly_correct(wrong, [(Score("right", "p", 0.9, 0.9, 0.0, 1), RIGHT)], samples, COLUMN, out)
    told = [
        (out.samples[a.sample_id].text, a.p_good, out.samples[b.sample_id].text, b.p_good) for a, b in out.pairs["p"]
    ]
    assert told == [
        (RIGHT.sample.text, 0.9, "3+8:1,", 0.0),
        ("8+3:1c1,5+2+1:8,", 0.5, "3+8:1,", 0.0),  # the one partial that the correct response does not begin with
        (RIGHT.sample.text, 0.9, "8+3:1c1,5+2+1:8,1+4:6,", 0.5),
        (RIGHT.sample.text, 0.9, "3+8:1c1,2+5+1:8,1+4:5,=518", 0.75),
    ]
    ends = {out.samples[b.sample_id].text: out.samples[b.sample_id].response_ids[-1] for _, b in out.pairs["p"]}
    assert ends["3+8:1,"] == ALPHABET.index(",") and ends["3+8:1c1,2+5+1:8,1+4:5,=518"] == 15


def test_without_a_correct_response_nothing_is_known() -> None:
    out = Candidates()
    partly_correct([MIDDLE], [], {"middle": MIDDLE.sample}, COLUMN, out)
    assert not out.pairs and out.counts == {"no_correct": 1}
