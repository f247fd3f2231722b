"""What is done in blocks of rows, in columns or by group is what a plain pass over the whole table gives."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from align.ensemble import normalise as normalise_module
from align.ensemble.base import weighted_votes
from align.ensemble.combine import Combined, combine
from align.ensemble.jury import correlation, correlations_with
from align.ensemble.normalise import row_mean, row_spread, voters
from align.ensemble.table import VerdictTable
from align.errors import InputError
from align.recipe import Ensemble
from align.records import content_id
from align.verifying import votes as votes_module
from align.verifying.labels import choose_labels
from align.verifying.report import error_correlation, true_report
from align.verifying.votes import Votes, read_votes

NAN = np.nan


def simulate(rows: int, scores: int, seed: int = 0) -> tuple[VerdictTable, np.ndarray]:
    """Eight verifiers on groups of four, `scores` of them real-valued; and gold [N]."""
    rng = np.random.default_rng(seed)
    gold = rng.random(rows) < 0.4
    values = np.where(rng.random((rows, 8)) < np.linspace(0.6, 0.9, 8), gold[:, None], ~gold[:, None]).astype(float)
    for j in range(scores):
        values[:, j] = rng.normal(gold * 1.5, 1.0)
    values[rng.random(values.shape) < 0.15] = NAN
    values[:3] = NAN  # nobody said anything
    kinds = tuple("score" if j < scores else "binary" for j in range(8))
    names = tuple(f"v{j}" for j in range(8))
    ids = tuple(f"i{i}" for i in range(rows))
    return VerdictTable(values, names, kinds, ("",) * 8, np.arange(rows) // 4, ids=ids), gold.astype(float)


# ---- sums in blocks ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise_module, "BLOCK_ROWS", 7)


def test_sums_in_blocks_are_those_of_the_whole(small_blocks: None) -> None:
    table, gold = simulate(100, 2)
    values = table.values
    np.testing.assert_array_equal(voters(values), (~np.isnan(values)).sum(axis=1))
    np.testing.assert_allclose(row_mean(values)[3:], np.nanmean(values[3:], axis=1), rtol=1e-13)
    np.testing.assert_allclose(row_spread(values)[3:], np.nanstd(values[3:], axis=1), rtol=1e-12)
    assert np.isnan(row_mean(values)[:3]).all() and np.isnan(row_spread(values)[:3]).all()
    heard, yes = weighted_votes(values, np.vstack([gold, np.ones(100)]))
    np.testing.assert_allclose(heard, [gold @ ~np.isnan(values), (~np.isnan(values)).sum(axis=0)])
    np.testing.assert_allclose(yes, [gold @ np.nan_to_num(values), np.nansum(values, axis=0)])


def test_correlations_with_an_opinion_are_those_column_by_column(small_blocks: None) -> None:
    table, gold = simulate(100, 4)
    opinion = np.where(np.arange(100) % 5 == 0, NAN, 0.3 + 0.1 * gold + 0.01 * np.arange(100))
    values = np.column_stack([table.normalised, np.ones(100), np.full(100, NAN)])
    expected = [correlation(column, opinion) for column in values.T]
    assert np.isnan(expected[-2:]).all()
    np.testing.assert_allclose(correlations_with(values, opinion), expected, rtol=1e-12)
    assert np.isnan(correlations_with(values, np.full(100, NAN))).all()


def told(combined: Combined) -> dict[str, Any]:
    """Every number of it."""
    return {
        "p_good": combined.p_good,
        "spread": combined.spread,
        "voters": combined.voters,
        "rates": np.array([(e.accuracy, e.tpr, e.tnr, e.coverage, e.positive_rate) for e in combined.estimates]),
        **combined.diagnostics,
    }


@pytest.mark.parametrize("scores", [0, 3, 8])
@pytest.mark.parametrize("labels", [0, 40])
def test_the_answer_does_not_hang_on_the_blocks(monkeypatch: pytest.MonkeyPatch, scores: int, labels: int) -> None:
    """The tolerance is 1e-9; what differs is the order in which floats are added."""
    found = []
    for rows in (64, 10**9):
        monkeypatch.setattr(normalise_module, "BLOCK_ROWS", rows)
        table, gold = simulate(600, scores)
        shown = {f"i{i}": bool(gold[i]) for i in range(0, 4 * labels, 4)}
        combined = combine(table, Ensemble(), shown or None)
        truth = true_report(table, combined, gold, np.arange(0, 4 * labels, 4))
        assert truth is not None
        found.append((combined, truth))
    (one, said), (other, said_too) = found
    assert (one.method, one.warnings) == (other.method, other.warnings)
    for name, value in told(one).items():
        np.testing.assert_allclose(told(other)[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(said["correlation"], said_too["correlation"], atol=1e-9)
    assert said["accuracy"] == pytest.approx(said_too["accuracy"], abs=1e-9)


def test_what_gold_says_of_a_verifier_is_counted() -> None:
    """Votes 1 0 - 1 against gold 1 1 1 0, and a verifier that says nothing where gold is."""
    values = np.array([[1.0, NAN], [0.0, NAN], [NAN, NAN], [1.0, NAN], [NAN, 1.0]])
    table = VerdictTable(values, ("a", "b"), ("binary", "binary"), ("", ""), np.arange(5))
    gold = np.array([1.0, 1.0, 1.0, 0.0, NAN])
    found = true_report(table, combine(table, Ensemble(method="mean")), gold, np.zeros(0, dtype=np.int64))
    assert found is not None
    row, silent = found["verifiers"]
    assert (row["judged"], row["accuracy"], row["tpr"], row["tnr"]) == (3, pytest.approx(1 / 3), 0.5, 0.0)
    assert silent["judged"] == 0 and np.isnan([silent["accuracy"], silent["tpr"], silent["low"]]).all()
    assert found["accuracy"]["best_single"] == 0.5  # b: never heard, half right; a: one of four and half of one, 0.375
    assert found["best_single"] == "b"


def test_correlation_of_errors_is_that_within_the_classes() -> None:
    rng = np.random.default_rng(0)
    gold = (np.arange(400) % 2).astype(float)
    votes = np.where(rng.random((400, 3)) < 0.8, gold[:, None], 1 - gold[:, None])
    votes[:200, 1] = votes[:200, 0]
    errors = votes - np.where(gold[:, None] == 1, votes[gold == 1].mean(axis=0), votes[gold == 0].mean(axis=0))
    np.testing.assert_allclose(error_correlation(votes, gold), np.corrcoef(errors.T), atol=1e-12)


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that Python and NumPy held above what they held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_the_ensemble_makes_no_copy_of_a_table_of_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits, diagnostics and report hold some numbers a row and one byte a vote, never the votes as floats again."""
    monkeypatch.setattr(normalise_module, "BLOCK_ROWS", 512)
    rng = np.random.default_rng(0)
    rows, count = 30_000, 60
    gold = rng.random(rows) < 0.5
    votes = np.where(rng.random((rows, count)) < 0.7, gold[:, None], ~gold[:, None]).astype(float)
    table = VerdictTable(votes, tuple(map(str, range(count))), ("binary",) * count, ("",) * count, np.arange(rows))
    for name in ("gate.JURY_ROWS", "prepare.LOOKED_AT", "diagnostics.LOOKED_AT", "patterns.SAMPLE_ROWS"):
        monkeypatch.setattr(f"align.ensemble.{name}", 1000)  # what is bounded is small beside the table
    peak = peak_bytes(lambda: true_report(table, combine(table, Ensemble()), gold * 1.0, np.zeros(0, dtype=np.int64)))
    assert peak < 0.9 * table.values.nbytes


def test_reading_holds_the_table_once_and_little_else(tmp_path: Path) -> None:
    rows, count = 20_000, 30
    path = tmp_path / "v.csv"
    head = f"item,group,gold,{','.join(f'v{j}' for j in range(count))}\n"
    path.write_text(head + "".join(f"i{i},g{i // 4},1,{','.join('10'[(i * j) % 2] for j in range(count))}\n"
                                   for i in range(rows)))  # fmt: skip
    read_votes(path)  # what is loaded once is not counted
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    peak = peak_bytes(lambda: read_votes(path))
    assert peak < 1.6 * rows * count * 8
    assert pool.bytes_allocated() - before < 4 * path.stat().st_size


# ---- the two readers -----------------------------------------------------------------------------------------------

ODD = [
    "1", "0", "", "1.0", "0.0", " 1", "1 ", "+1", "-0", "01", "0x1", "true", "2", "nan", "1e0", '"1"', '""', '"1', '1"',
    '"1"0', '"a"b', '"a,b"', '"a""b"', '"a\nb"', "a\r", "a\rb", '"a,"b', '"', '"""', "1_0", "inf", "1e999", "-1e-400",
    ".5", "5.", "x\0y", "é",
]  # fmt: skip


def outcome(path: Path) -> Votes | str:
    try:
        return read_votes(path)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_both_readers_make_the_same_of_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: int, ending: str
) -> None:
    """In any column, in the last row or before it, with any line end."""
    for k, odd in enumerate(ODD):
        cells = ["x", "q", "1", "0", "2.5"]
        cells[column] = odd
        rows = ["item,group,gold,a,b~", "i1,q,1,1,1", ",".join(cells), "i2,,,,"]
        path = tmp_path / f"{k}.csv"
        for order in (rows, [rows[0], rows[3], rows[1], rows[2]]):
            path.write_bytes(((ending or "\n").join(order) + ending).encode())
            quick = outcome(path)
            with monkeypatch.context() as context:
                context.setattr(votes_module, "read_plain", lambda *_: None)
                careful = outcome(path)
            if isinstance(careful, str) or isinstance(quick, str):
                assert quick == careful, odd
                continue
            assert quick.items.to_pylist() == careful.items.to_pylist(), odd
            assert quick.group_names.to_pylist() == careful.group_names.to_pylist(), odd
            for name in ("values", "gold", "groups"):
                np.testing.assert_array_equal(getattr(quick, name), getattr(careful, name), err_msg=repr(odd))


def test_a_plain_file_is_read_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes that open and close whole fields are plain too; 1.0 is what a table with blanks makes of 1."""

    def careful(*_: object) -> None:
        raise AssertionError("read with care")

    monkeypatch.setattr(votes_module._Columns, "take", careful)
    path = tmp_path / "v.csv"
    path.write_bytes(b'\xef\xbb\xbf"item",gold,a,b~,group\r\n"x, ""y""",1.0,0.0,-1e-3,"q\nr"\r\nz,,,,\r\n')
    found = read_votes(path)
    assert found.items.to_pylist() == ['x, "y"', "z"] and found.group_names.to_pylist() == ["q\nr", ""]
    np.testing.assert_array_equal(found.values, [[0, -0.001], [NAN, NAN]])
    np.testing.assert_array_equal(found.gold, [1, NAN])


def test_a_quote_split_between_two_reads_is_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick reader asks for blocks; a check that forgot the last byte of one would pass over this."""
    from align.verifying.quick import _Checked, _NotPlainError

    good, bad = b'"a""b","c"\r\nd,e\n', b'"a"b,"c"\r\nd,e\n'
    for size in (1, 2, 3, 5, 100):
        for text, fine in ((good, True), (bad, False), (b"a\rb\n", False), (b'a,"b\n', False), (b'a,"b"', True)):
            path = tmp_path / "t"
            path.write_bytes(text)
            with open(path, "rb") as file:
                checked = _Checked(file)
                parts: list[bytes] = []
                try:
                    while part := checked.read(size):
                        parts.append(part)
                    assert fine and b"".join(parts) == text, (size, text)
                except _NotPlainError:
                    assert not fine, (size, text)


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_those_of_a_sort_of_all_items(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 120))
    items = [f"i{k}" for k in rng.permutation(count)]
    groups = ["" if rng.random() < 0.15 * (seed % 3) else f"g{rng.integers(0, count // (1 + seed % 6))}" for _ in items]
    allowed = rng.random(count) < 0.8
    keyed = sorted(
        (content_id("group", g) if g else content_id("item alone", n), content_id("item", n), row)
        for row, (n, g) in enumerate(zip(items, groups, strict=True))
        if allowed[row]
    )
    met: dict[str, int] = {}
    turns = []
    for group, item, row in keyed:
        turns.append((met.setdefault(group, 0), group, item, row))
        met[group] += 1
    turns.sort()
    names, group_names = (pa.chunked_array([x[:9], x[9:]], type=pa.large_string()) for x in (items, groups))
    for wanted in (2, 7, len(turns) // 2, len(turns)):
        chosen = choose_labels(names, group_names, allowed, wanted, "f")
        assert chosen.tolist() == sorted(row for *_, row in turns[:wanted])


def test_a_table_keeps_its_verdicts_by_column_and_lets_nobody_write_to_the_normalised() -> None:
    table, _ = simulate(20, 3)
    assert table.values.flags.f_contiguous and table.normalised.flags.f_contiguous
    with pytest.raises(ValueError, match="read-only"):
        table.normalised[0, 0] = 1.0
    assert replace(table, ids=()).values is table.values
