"""The verdicts of a round as one array.

Legend: N samples, M verifiers, P prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align.ensemble.normalise import midranks, voters
from align.records import Sample, Verdict
from align.verifiers.extract import last_boxed, last_number
from align.verifiers.registry import kind_of, sees_whole_prompts
from align.verifiers.spec import VerifierSpec

NO_VERDICT = "no verdict on record"


@dataclass(frozen=True)
class VerdictTable:
    """What every verifier said of every sample; NaN where it gave none.

    The values are kept column by column, and nothing writes to them.

    Example: VerdictTable(values=np.array([[1.0, 0.3], [0.0, np.nan]]), names=("nines", "reward"),
    kinds=("binary", "score"), families=("", ""), prompts=np.array([0, 0]), failures=({}, {"too long": 1}))
    """

    values: np.ndarray  # [N, M] float64; binary verifiers say 0 or 1, score verifiers any finite number
    names: tuple[str, ...]  # [M]
    kinds: tuple[str, ...]  # [M] "binary" or "score"
    families: tuple[str, ...]  # [M] verifiers with the same non-empty family share a source of error
    prompts: np.ndarray  # [N] int: which prompt a sample answers
    failures: tuple[Mapping[str, int], ...] = ()  # [M] how often each reason stands for a missing verdict
    whole_prompts: tuple[bool, ...] = ()  # [M] judges a prompt's responses by each other; empty: none does
    ids: tuple[str, ...] = ()  # [N] sample ids, by which labels are found; empty: nothing can be labelled
    answers: tuple[str, ...] = ()  # [N] the final answer that a response gives, "" where there is none; empty: unknown

    def __post_init__(self) -> None:
        n, m = self.values.shape
        assert len(self.names) == len(self.kinds) == len(self.families) == m and self.prompts.shape == (n,)
        assert len(self.failures) in (0, m) and set(self.kinds) <= {"binary", "score"}
        assert len(self.whole_prompts) in (0, m) and len(self.ids) in (0, n) and len(self.answers) in (0, n)
        object.__setattr__(self, "values", np.asfortranarray(self.values))
        for name, kind, column in zip(self.names, self.kinds, self.values.T, strict=True):
            if np.isinf(column).any():
                raise ValueError(f"verifier {name!r} gave an infinite value")
            if kind == "binary" and not (np.isnan(column) | (column == 0) | (column == 1)).all():
                raise ValueError(f"verifier {name!r} is binary but gave a value other than 0 and 1")

    @cached_property
    def normalised(self) -> np.ndarray:
        """[N, M]: see normalise.normalise."""
        if "score" not in self.kinds:
            found = self.values.view()
        else:
            found = np.empty(self.values.shape, order="F")
            for j, kind in enumerate(self.kinds):
                found[:, j] = self.values[:, j] if kind == "binary" else midranks(self.values[:, j])
        found.flags.writeable = False
        return found

    @cached_property
    def voters(self) -> np.ndarray:
        """[N] int: how many verifiers said something of each sample."""
        return voters(self.values)

    def sources(self) -> list[list[int]]:
        """Columns of each source, in the order of their first: the members of a family, or one lone verifier."""
        found: dict[str, list[int]] = {}
        for j, family in enumerate(self.families):
            found.setdefault(f"family {family}" if family else f"column {j}", []).append(j)
        return list(found.values())


def from_records(samples: Sequence[Sample], verdicts: Sequence[Verdict], specs: Sequence[VerifierSpec]) -> VerdictTable:
    """The table of these samples, rows in their order, one column per verifier of the recipe in its order."""
    row = {sample.id: i for i, sample in enumerate(samples)}
    column = {spec.name: j for j, spec in enumerate(specs)}
    if len(row) != len(samples):
        raise ValueError("a sample id occurs twice")
    values = np.full((len(samples), len(specs)), np.nan)
    seen = np.zeros(values.shape, dtype=bool)
    failures: list[Counter[str]] = [Counter() for _ in specs]
    for verdict in verdicts:
        if verdict.sample_id not in row or verdict.verifier not in column:
            raise ValueError(f"verdict of {verdict.verifier!r} on {verdict.sample_id!r}: no such sample or verifier")
        i, j = row[verdict.sample_id], column[verdict.verifier]
        if seen[i, j]:
            raise ValueError(f"two verdicts of {verdict.verifier!r} on {verdict.sample_id!r}")
        seen[i, j] = True
        if verdict.value is None:
            failures[j][verdict.reason or "no reason given"] += 1
        elif not math.isfinite(verdict.value):
            raise ValueError(f"verifier {verdict.verifier!r} gave {verdict.value}; it must be a number or none")
        else:
            values[i, j] = verdict.value
    for j, missing in enumerate((~seen).sum(axis=0).tolist()):
        if missing:
            failures[j][NO_VERDICT] += missing
    number: dict[str, int] = {}
    prompts = np.array([number.setdefault(sample.prompt_id, len(number)) for sample in samples], dtype=np.int64)
    return VerdictTable(
        values=values,
        names=tuple(column),
        kinds=tuple(kind_of(spec) for spec in specs),
        families=tuple(spec.family or "" for spec in specs),
        prompts=prompts,
        failures=tuple(dict(counter) for counter in failures),
        whole_prompts=tuple(sees_whole_prompts(spec) for spec in specs),
        ids=tuple(row),
        answers=tuple(final_answer(sample.text) for sample in samples),
    )


def final_answer(response: str) -> str:
    """What stands in its last box, else its last number, else nothing."""
    return last_boxed(response) or last_number(response) or ""
