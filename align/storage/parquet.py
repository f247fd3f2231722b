"""Records as Parquet: one explicit schema per record class, built and read column by column.

The round trip is exact: floats stay 64-bit (byte-stream-split, so a log-prob that came from a float32 costs no more
than one), ids are 32-bit, a count out of range is an error.  The same rows give the same bytes.

Legend: N rows, T tokens of all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import RunError
from align.records import Comparison, Pair, PrefixValue, Sample, Score, Verdict

Record = Sample | Verdict | Comparison | Score | Pair | PrefixValue
VERSION = "1"  # of the schemas below; a file of another version is refused

_ID = pa.string()
_TOKENS = pa.list_(pa.field("element", pa.int32(), nullable=False))
_FLOATS = pa.list_(pa.field("element", pa.float64(), nullable=False))
_NULLABLE = {(Verdict, "value"), (Verdict, "reason"), (Comparison, "strength"), (Comparison, "reason")}
_TYPES: dict[type, dict[str, pa.DataType]] = {
    Sample: {
        "id": _ID, "prompt_id": _ID, "index": pa.int32(), "policy_version": pa.int32(), "seed": pa.int64(),
        "prompt_ids": _TOKENS, "response_ids": _TOKENS, "logprobs": _FLOATS, "text": pa.string(),
        "finish_reason": pa.string(), "temperature": pa.float64(), "top_p": pa.float64(), "top_k": pa.int32(),
        "max_new_tokens": pa.int32(),
    },
    Verdict: {
        "sample_id": _ID, "verifier": pa.string(), "value": pa.float64(), "reason": pa.string(),
        "seconds": pa.float64(),
    },
    Comparison: {
        "prompt_id": _ID, "first_id": _ID, "second_id": _ID, "verifier": pa.string(), "strength": pa.float64(),
        "reason": pa.string(),
    },
    Score: {
        "sample_id": _ID, "prompt_id": _ID, "p_good": pa.float64(), "reward": pa.float64(), "spread": pa.float64(),
        "voters": pa.int32(),
    },
    Pair: {
        "id": _ID, "prompt_id": _ID, "chosen_id": _ID, "rejected_id": _ID, "p_win": pa.float64(), "p_tie": pa.float64(),
        "weight": pa.float64(), "margin": pa.float64(), "builder": pa.string(),
    },
    PrefixValue: {
        "id": _ID, "prompt_id": _ID, "sample_id": _ID, "step": pa.int32(), "tokens": pa.int32(), "rollouts": pa.int32(),
        "value": pa.float64(), "best": pa.float64(),
    },
}  # fmt: skip


def schema(kind: type[Record]) -> pa.Schema:
    """The Arrow schema of a record class; its metadata names the class and the version."""
    columns = [pa.field(name, t, nullable=(kind, name) in _NULLABLE) for name, t in _TYPES[kind].items()]
    return pa.schema(columns, metadata={"align.record": kind.__name__, "align.version": VERSION})


def identity(row: Record) -> str | tuple[str, str]:
    """What a row is known by: two rows with one identity are the same work."""
    if isinstance(row, Verdict):
        return (row.sample_id, row.verifier)
    if isinstance(row, Comparison):
        return (row.first_id, row.second_id)
    return row.sample_id if isinstance(row, Score) else row.id


def encode(kind: type[Record], rows: Sequence[Record]) -> bytes:
    """The rows as one Parquet file.  ValueError names the row and the column that cannot be stored."""
    for number, row in enumerate(rows):
        if type(row) is not kind:
            raise ValueError(f"row {number} is a {type(row).__name__}, not a {kind.__name__}")
    wanted = schema(kind)
    columns = [_column(field, [getattr(row, field.name) for row in rows]) for field in wanted]
    sink = pa.BufferOutputStream()
    leaves = {f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name: f.type for f in wanted}
    floats = [name for name, type_ in leaves.items() if type_ in (_FLOATS, pa.float64())]
    pq.write_table(
        pa.Table.from_arrays(columns, schema=wanted),
        sink,
        compression="zstd",
        version="2.6",
        use_dictionary=[name for name in leaves if name not in floats],
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )
    return sink.getvalue().to_pybytes()


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        if pa.types.is_list(field.type):
            return _list_column(field, values)
        if pa.types.is_float64(field.type):
            _check_finite(field, values)
        column = pa.array(values, type=field.type)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(f"column {field.name!r}: {error}") from error
    if column.null_count and not field.nullable:
        raise ValueError(f"column {field.name!r}: row {values.index(None)} has no value")
    return column


def _list_column(field: pa.Field, values: list[Any]) -> pa.Array:
    """One flat array of T values and N + 1 offsets: no Python object per token reaches Arrow."""
    offsets = np.fromiter(accumulate((len(row) for row in values), initial=0), dtype=np.int64, count=len(values) + 1)
    if offsets[-1] >= 2**31:
        raise ValueError(f"column {field.name!r}: {offsets[-1]} tokens in one shard; lower sampling.prompts_per_shard")
    kind = field.type.value_type.to_pandas_dtype()
    flat = np.fromiter(chain.from_iterable(values), dtype=kind, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat), type=field.type)


def _check_finite(field: pa.Field, values: list[Any]) -> None:
    """A score that is not a number must be none with a reason, or stop the run; it is never stored."""
    for number, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"column {field.name!r}: row {number} is {value}")


def decode(kind: type[Record], data: bytes, path: Path) -> list[Any]:
    """The rows of a file written by `encode`; `path` is for the message where it is something else."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable Parquet file: {error}") from None
    wanted = schema(kind)
    if not table.schema.equals(wanted, check_metadata=True):
        found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        raise RunError(
            f"{path}: holds {found.get('align.record', 'no records')} of schema version {found.get('align.version')}, "
            f"not {kind.__name__} of version {VERSION}; it was written by another version of Align"
        )
    columns = [_values(table.column(field.name)) for field in fields(kind)]
    return [kind(*row) for row in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    rows: list[Any] = []
    for chunk in column.chunks:
        flat, ends = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        rows.extend(tuple(flat[start:end].tolist()) for start, end in zip(ends, ends[1:], strict=False))
    return rows
