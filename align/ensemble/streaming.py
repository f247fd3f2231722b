"""Votes on millions of responses, chunk by chunk: a chunk is read, counted and forgotten.

What is kept of a response is one small number per block of about seven voters (patterns.py), so a million responses by
thirty voters take some tens of megabytes.  Dawid-Skene needs those numbers; the moment methods need no more than how
often two answers come together.  Cost is linear in the responses.

Legend: n rows of a chunk, N responses in all, M voters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from align.ensemble.base import Fit, shrink, sigmoid
from align.ensemble.channels import Channel
from align.ensemble.dawid_skene import MAX_LOG_ODDS, DawidSkene, maximise
from align.ensemble.diagnostics import collapsed, worse_than_chance
from align.ensemble.patterns import Patterns, make_blocks, pattern_numbers

CHUNK_ROWS = 65_536
LEVELS = 2


def read_chunks(path: Path, columns: Sequence[str], rows: int = CHUNK_ROWS) -> Iterator[np.ndarray]:
    """[n, M] of these columns of a Parquet or CSV file (which may be compressed), blanks as NaN."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(rows, columns=list(columns)):
                yield _array([batch.column(name) for name in columns])
        return
    from pyarrow import csv, float64

    convert = csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, float64()))
    with csv.open_csv(path, convert_options=convert) as reader:
        for batch in reader:
            yield _array([batch.column(name) for name in columns])


def _array(columns: Sequence) -> np.ndarray:
    return np.column_stack([c.cast("float64").to_numpy(zero_copy_only=False) for c in columns])


def fit_stream(chunks: Iterable[np.ndarray], model: DawidSkene) -> Fit:
    """Dawid-Skene on chunks [n, M] of 0, 1 and NaN, as DawidSkene would fit them in one table of votes."""
    joint: list[list[np.ndarray]] = []
    starts: list[np.ndarray] = []
    voters: list[np.ndarray] = []
    sizes: list[int] = []
    for chunk in chunks:
        codes = np.where(np.isnan(chunk), -1, chunk).astype(np.int8)
        if ((codes < -1) | (codes > 1)).any():
            raise ValueError("a vote is 0, 1 or blank")
        sizes = [LEVELS] * chunk.shape[1]
        heard = (codes >= 0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            mean = (codes == 1).sum(axis=1) / np.maximum(heard, 1)
        starts.append(np.nan_to_num(shrink(mean, heard, model.pseudo), nan=0.5))
        voters.append(heard.astype(np.int16))
        columns = list(np.ascontiguousarray(codes.T))
        joint.append([pattern_numbers(columns, sizes, b).astype(np.int16) for b in make_blocks(sizes)])
    if not joint:
        raise ValueError("no votes at all")
    blocks = make_blocks(sizes)
    codes_of = tuple(np.concatenate([j[b] for j in joint]).astype(np.int64) for b in range(len(blocks)))
    joint.clear()
    start, heard = np.concatenate(starts), np.concatenate(voters)
    table = Patterns(codes_of, tuple(blocks), np.ones(len(start)), None, sum(sizes))
    made = [Channel(np.empty(0, dtype=np.int64), np.array([0.0, 1.0]), (j,)) for j in range(len(sizes))]
    em = maximise(table, made, start, np.full(len(start), np.nan), model)
    good, bad = np.concatenate(em.good), np.concatenate(em.bad)
    evidence = table.sums(np.clip(np.log(good) - np.log(bad), -MAX_LOG_ODDS, MAX_LOG_ODDS))
    p_good = sigmoid(np.log(em.balance) - np.log1p(-em.balance) + evidence)
    p_good[heard == 0] = np.nan
    tpr, tnr = good[1::2], bad[0::2]
    names = [str(j) for j in range(len(sizes))]
    warnings = worse_than_chance(names, tpr, tnr) + collapsed(p_good, model.balance)
    told = {"iterations": float(em.iterations), "converged": float(em.converged)}
    return Fit(p_good, em.balance, tpr, tnr, told, warnings)
