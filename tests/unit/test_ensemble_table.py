"""Verdict records to a table, and verdicts on one scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from align.ensemble.normalise import binarise, midranks, normalise, row_mean, row_spread
from align.ensemble.table import NO_VERDICT, VerdictTable, from_records
from align.records import Sample, Verdict
from align.verifiers.spec import VerifierSpec

NAN = float("nan")


def sample(identity: str, prompt: str) -> Sample:
    return Sample(identity, prompt, 0, 0, 0, (1,), (2, 3), (-0.1, -0.1), "5", "stop", 1.0, 1.0, 0, 8)


def spec(**settings: object) -> VerifierSpec:
    return TypeAdapter(VerifierSpec).validate_python(settings)


SPECS = (
    spec(kind="arithmetic", name="parity", check="parity", family="last"),
    spec(kind="self_consistency", name="agree"),
)
SAMPLES = [sample("s0", "p9"), sample("s1", "p9"), sample("s2", "p1")]


def table_of(values: list[list[float]], kinds: tuple[str, ...]) -> VerdictTable:
    names = tuple(f"v{j}" for j in range(len(kinds)))
    return VerdictTable(np.array(values, dtype=float), names, kinds, ("",) * len(kinds), np.zeros(len(values), int))


def test_a_verdict_lands_in_its_cell_and_a_failure_is_counted_by_reason() -> None:
    verdicts = [
        Verdict("s2", "agree", 0.25, None),
        Verdict("s0", "parity", 1.0, None),
        Verdict("s0", "agree", None, "no number"),
        Verdict("s1", "agree", None, "no number"),
    ]
    table = from_records(SAMPLES, verdicts, SPECS)
    np.testing.assert_array_equal(table.values, [[1.0, NAN], [NAN, NAN], [NAN, 0.25]])
    assert table.kinds == ("binary", "score") and table.families == ("last", "")
    assert table.prompts.tolist() == [0, 0, 1]
    assert table.failures == ({NO_VERDICT: 2}, {"no number": 2})


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([Verdict("s9", "agree", 1.0, None)], "'s9'"),
        ([Verdict("s0", "other", 1.0, None)], "'other'"),
        ([Verdict("s0", "agree", 1.0, None)] * 2, "two verdicts of 'agree' on 's0'"),
        ([Verdict("s0", "agree", NAN, None)], "'agree' gave nan"),
        ([Verdict("s0", "parity", 0.5, None)], "'parity' is binary"),
    ],
)
def test_bad_verdicts_are_refused_by_name(verdicts: list[Verdict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_records(SAMPLES, verdicts, SPECS)


def test_an_infinite_score_is_refused() -> None:
    with pytest.raises(ValueError, match="'v1' gave an infinite value"):
        table_of([[1.0, np.inf]], ("binary", "score"))


def test_midranks_share_ties_and_skip_the_absent() -> None:
    np.testing.assert_allclose(midranks(np.array([10.0, 30, 30, NAN])), [1 / 6, 4 / 6, 4 / 6, NAN])
    assert np.isnan(midranks(np.array([NAN, NAN]))).all()


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30))
def test_midranks_average_one_half_and_ignore_any_rising_scale(numbers: list[int]) -> None:
    values = np.array(numbers, dtype=float)
    ranks = midranks(values)
    assert ranks.mean() == pytest.approx(0.5)
    np.testing.assert_allclose(midranks(values**3 + 7), ranks)
    np.testing.assert_allclose(midranks(-values), 1 - ranks)


def test_votes_stay_votes_and_scores_become_ranks() -> None:
    table = table_of([[1, -5], [1, 900], [NAN, 3], [0, NAN]], ("binary", "score"))
    np.testing.assert_allclose(normalise(table), [[1, 1 / 6], [1, 5 / 6], [NAN, 3 / 6], [0, NAN]])


@pytest.mark.parametrize(("balance", "yes"), [(None, [0, 0, 1, 1]), (0.25, [0, 0, 0, 1]), (0.75, [0, 1, 1, 1])])
def test_a_score_says_yes_in_the_top_share(balance: float | None, yes: list[int]) -> None:
    table = table_of([[1, 10], [0, 20], [0, 30], [1, 40]], ("binary", "score"))
    votes = binarise(table, balance)
    np.testing.assert_array_equal(votes[:, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(votes[:, 1], yes)


def test_row_statistics_leave_out_the_absent() -> None:
    values = np.array([[1.0, 0.0, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]])
    np.testing.assert_allclose(row_mean(values), [0.5, 0.5, NAN])
    np.testing.assert_allclose(row_spread(values), [0.5, 0.0, NAN])
