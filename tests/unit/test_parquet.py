"""Records through Parquet and back: nothing changes, and what cannot be stored is refused."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import RunError
from align.records import Comparison, Pair, Sample, Score, Verdict
from align.storage import parquet
from align.storage.parquet import decode, encode, identity, schema

HERE = Path("shard.parquet")
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(tuple)
TEXT = st.text(max_size=8)
SMALL = st.integers(0, 2**31 - 1)
RECORDS = {
    Sample: st.builds(
        Sample, TEXT, TEXT, SMALL, SMALL, st.integers(0, 2**63 - 1), TOKENS, TOKENS,
        st.lists(FINITE | st.just(-math.inf), max_size=6).map(tuple), TEXT, TEXT, FINITE, FINITE, SMALL, SMALL,
    ),
    Verdict: st.builds(Verdict, TEXT, TEXT, st.none() | FINITE, st.none() | TEXT, FINITE),
    Comparison: st.builds(Comparison, TEXT, TEXT, TEXT, TEXT, st.none() | FINITE, st.none() | TEXT),
    Score: st.builds(Score, TEXT, TEXT, FINITE, FINITE, FINITE, SMALL),
    Pair: st.builds(Pair, TEXT, TEXT, TEXT, TEXT, FINITE, FINITE, FINITE, FINITE, TEXT),
}  # fmt: skip
SAMPLE = Sample("9c", "3f", 0, 2, 81, (4, 5), (8, 10, 1), (-0.1, -0.3, -0.01), "579", "stop", 1.0, 1.0, 0, 8)
VERDICT = Verdict("9c", "nines", 1.0, None, 2e-6)
SCORE = Score("9c", "3f", 0.93, 0.93, 0.21, 6)


@pytest.mark.parametrize("kind", RECORDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_round_trip_is_exact(kind: type, data: st.DataObject) -> None:
    rows = data.draw(st.lists(RECORDS[kind], max_size=5))
    stored = encode(kind, rows)
    assert decode(kind, stored, HERE) == rows
    assert encode(kind, rows) == stored


def test_floats_keep_every_bit() -> None:
    """A log-prob need not be a float32, zeros keep their sign, and denormals survive."""
    values = (-0.1, -0.0, 5e-324, -math.inf, math.nextafter(-1.0, 0))
    (row,) = decode(Sample, encode(Sample, [replace(SAMPLE, logprobs=values)]), HERE)
    assert [struct.pack("d", v) for v in row.logprobs] == [struct.pack("d", v) for v in values]


def test_types_come_back_as_they_went() -> None:
    (row,) = decode(Sample, encode(Sample, [SAMPLE]), HERE)
    assert [type(getattr(row, f.name)) for f in fields(row)] == [type(getattr(SAMPLE, f.name)) for f in fields(SAMPLE)]
    assert type(row.response_ids[0]) is int and type(row.logprobs[0]) is float


def test_a_log_prob_from_a_float32_costs_no_more_than_one() -> None:
    """Byte-stream-split puts the 29 zero bits of each together, where zstd makes nothing of them."""
    logprobs = [struct.unpack("f", struct.pack("f", -(math.sin(i) ** 2)))[0] for i in range(20_000)]
    with_them = encode(Sample, [replace(SAMPLE, logprobs=tuple(logprobs))])
    without = encode(Sample, [replace(SAMPLE, logprobs=())])
    assert len(with_them) - len(without) < 4.1 * 20_000


@pytest.mark.parametrize("kind", RECORDS)
def test_the_schema_has_every_field_and_says_what_it_is(kind: type) -> None:
    assert [f.name for f in fields(kind)] == schema(kind).names
    assert schema(kind).metadata == {b"align.record": kind.__name__.encode(), b"align.version": b"1"}
    silent = {Verdict: ["value", "reason"], Comparison: ["strength", "reason"]}
    assert [f.name for f in schema(kind) if f.nullable] == silent.get(kind, [])


def test_the_file_is_compressed_and_self_describing(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    path.write_bytes(encode(Verdict, [VERDICT] * 3))
    meta = pq.read_metadata(path)
    assert meta.num_rows == 3 and meta.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_schema(path).metadata[b"align.record"] == b"Verdict"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([VERDICT, replace(VERDICT, value=math.nan)], "column 'value': row 1 is nan"),
        ([replace(SCORE, reward=math.inf)], "column 'reward': row 0 is inf"),
        ([SCORE, replace(SCORE, p_good=None)], "column 'p_good': row 1 has no value"),
        ([replace(SAMPLE, prompt_ids=(2**31,))], "column 'prompt_ids'"),
        ([replace(SAMPLE, text="\ud800")], "column 'text'"),
        ([replace(SAMPLE, index="first")], "column 'index'"),
        ([SCORE, VERDICT], "row 1 is a Verdict, not a Score"),
    ],
)
def test_what_cannot_be_stored_is_refused(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(type(rows[0]), rows)


def test_a_list_column_may_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge(tuple):
        def __len__(self) -> int:
            return 2**31

    with pytest.raises(ValueError, match="lower sampling.prompts_per_shard"):
        encode(Sample, [replace(SAMPLE, prompt_ids=Huge())])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", encode(Score, [SCORE])[:-9]])
def test_a_file_that_is_not_parquet_is_named(data: bytes) -> None:
    with pytest.raises(RunError, match="shard.parquet: not a readable Parquet file"):
        decode(Score, data, HERE)


def test_another_record_or_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="holds Verdict of schema version 1, not Score of version 1"):
        decode(Score, encode(Verdict, [VERDICT]), HERE)
    old = encode(Score, [SCORE])
    monkeypatch.setattr(parquet, "VERSION", "2")
    with pytest.raises(RunError, match="holds Score of schema version 1, not Score of version 2"):
        decode(Score, old, HERE)


def test_identities() -> None:
    pair = Pair("b7", "3f", "9c", "10", 0.8, 0.17, 0.83, 0.6, "best_worst")
    assert [identity(row) for row in (SAMPLE, VERDICT, SCORE, pair)] == ["9c", ("9c", "nines"), "9c", "b7"]
