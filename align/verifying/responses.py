"""A file of responses judged by a recipe's verifiers, a few prompts at a time: no more text is held than that.

The file is read twice.  The first time every row is checked and the last row of each prompt found; the second time a
prompt's responses go to the verifiers together as soon as that row is met, because some judge them by each other.

Legend: N responses, M verifiers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa

from align.ensemble.table import VerdictTable, final_answer
from align.errors import InputError
from align.progress import say
from align.prompt_sources import Row, RowErrors, iterate_rows, text_of
from align.prompts import columns_of
from align.recipe import Recipe
from align.records import Verdict, content_id
from align.storage.durable import hash_file
from align.verifiers import registry
from align.verifiers.base import Item
from align.verifiers.cache import VerdictCache, open_cache
from align.verifiers.runner import MOST_REASONS, OTHER_REASONS, VerifierPool
from align.verifiers.spec import LengthSpec, VerifierSpec
from align.verify import Cost, Subject, all_faults, finish
from align.verifying.labels import check_count
from align.verifying.output import check_output

CHUNK_ITEMS = 2048
COLUMNS = {"prompt": True, "response": True, "answer": False, "gold": False, "item": False}
"""What is read, and whether the file must have it."""
SHOWN_PROMPTS = 3
_NO_NOTES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which column of the file holds what; None where it has no such column.

    Example: Columns("prompt", "response", "answer", None, None)
    """

    prompt: str
    response: str
    answer: str | None
    gold: str | None
    item: str | None
    wanted: tuple[str, ...] = ()  # further columns that the recipe's verifiers read


class Line(NamedTuple):
    """One row, checked.  Example: Line("r.jsonl:3", "1+2=", "3", "3", 1.0, "3")"""

    where: str
    prompt: str
    response: str
    answer: str | None
    gold: float  # 1, 0 or NaN
    item: str
    columns: tuple[tuple[str, str], ...] = ()  # those that verifiers read


@dataclass
class Facts:
    """What the first reading finds.

    Example: Facts(items=["1", "2"], groups=[0, 0], gold=[1.0, nan], prompts={"3f…": 0}, last=[1])
    """

    items: list[str] = field(default_factory=list)  # [N]
    groups: list[int] = field(default_factory=list)  # [N]
    gold: list[float] = field(default_factory=list)  # [N]
    prompts: dict[str, int] = field(default_factory=dict)  # id of a prompt -> its number
    last: list[int] = field(default_factory=list)  # by number: the prompt's last row


def verify_responses(recipe: Recipe, path: Path, labels: int | None, out: Path, named: Sequence[str] = ()) -> list[str]:
    """Score the responses into `out` with the recipe's verifiers; returns the report as lines."""
    _, _, columns, *_ = all_faults(
        lambda: check_output(out),
        lambda: check_count(labels, None, str(path)),
        lambda: find_columns(path, named),
        *(lambda spec=spec: registry.check(spec, f"verifiers.{spec.name}") for spec in recipe.verifiers),
    )
    columns = replace(columns, wanted=recipe.verifier_columns())
    facts = survey(path, columns)
    gold, by = _gold(recipe, path, columns, facts)
    allowed, notes = ~np.isnan(gold), _NO_NOTES
    if labels is not None:
        allowed, notes = without_evaluation(recipe, path, columns, facts, allowed)
    check_count(labels, int(allowed.sum()), str(path))
    table, costs = judge(recipe, recipe.verifiers, path, columns, facts)
    names = list(facts.prompts)
    subject = Subject(
        facts={"file": str(path), "sha256": hash_file(path.resolve()).sha256, "recipe": recipe.name, "gold_from": by},
        items=pa.chunked_array([pa.array(facts.items, type=pa.large_string())]),
        group_names=pa.chunked_array([pa.array([names[g] for g in facts.groups], type=pa.large_string())]),
        gold=gold,
        table=table,
        allowed=allowed,
        costs=costs,
        notes=notes,
    )
    return finish(subject, recipe.ensemble, labels, out, plot=True)


def find_columns(path: Path, named: Sequence[str]) -> Columns:
    """The columns to read: those named by `NAME=COLUMN`, else the names themselves where the first row has them."""
    chosen: dict[str, str] = {}
    for text in named:
        name, _, column = text.partition("=")
        if name not in COLUMNS or not column:
            hint = get_close_matches(name, COLUMNS, n=1)
            said = f"did you mean {hint[0]}=…?" if hint else f"write NAME=COLUMN with NAME one of {', '.join(COLUMNS)}"
            raise InputError(f"--column {text}: {said}")
        if name in chosen:
            raise InputError(f"--column {text}: {name} is given twice")
        chosen[name] = column
    first = next(iterate_rows(str(path), key="RESPONSES"), None)
    if first is None:
        raise InputError(f"RESPONSES: {path} holds no rows")
    found: dict[str, str | None] = {}
    for name, needed in COLUMNS.items():
        column = chosen.get(name, name)
        there = column in first.values
        if not there and (needed or name in chosen):
            present = ", ".join(map(repr, first.values)) or "none"
            raise InputError(f"{first.where}: no column {column!r}; it has {present}; name it by --column {name}=…")
        found[name] = column if there else None
    assert found["prompt"] is not None and found["response"] is not None
    return Columns(found["prompt"], found["response"], found["answer"], found["gold"], found["item"])


def survey(path: Path, columns: Columns) -> Facts:
    """The first reading; InputError names every bad row."""
    facts, errors, known = Facts(), RowErrors(), set()
    for number, row in enumerate(iterate_rows(str(path), key="RESPONSES")):
        before = errors.count
        line = _line(row, number, columns, errors)
        if line is None or errors.count > before:
            continue
        if line.item in known:
            errors.add(f"{row.where}: {columns.item}: {line.item!r} stands there already; give each row its own name")
        known.add(line.item)
        group = facts.prompts.setdefault(content_id(line.prompt), len(facts.prompts))
        if group == len(facts.last):
            facts.last.append(number)
        facts.last[group] = number
        facts.items.append(line.item)
        facts.groups.append(group)
        facts.gold.append(line.gold)
    errors.check("--column NAME=COLUMN says which column holds the prompt, response, answer, gold or item")
    return facts


def _line(row: Row, number: int, columns: Columns, errors: RowErrors) -> Line | None:
    """The row's values; None, or an error more, where one is wrong.  An empty response is a response."""
    prompt = text_of(row, columns.prompt, errors)
    response = "" if row.values.get(columns.response) == "" else text_of(row, columns.response, errors)
    answer, item = None, str(number + 1)
    if columns.answer is not None and row.values.get(columns.answer) not in (None, ""):
        answer = text_of(row, columns.answer, errors, integers=True)
    if columns.item is not None:
        item = text_of(row, columns.item, errors, integers=True) or ""
    gold = math.nan
    if columns.gold is not None:
        value = row.values.get(columns.gold)
        if value in (True, 1, "1", "1.0"):
            gold = 1.0
        elif value in (False, 0, "0", "0.0"):
            gold = 0.0
        elif value not in (None, "") and value == value:
            errors.add(f"{row.where}: {columns.gold}: {str(value)[:40]!r} is not 1, 0 or blank")
    if prompt is None or response is None:
        return None
    return Line(row.where, prompt, response, answer, gold, item, columns_of(row, columns.wanted))


def _lines(path: Path, columns: Columns) -> Iterator[tuple[int, Line]]:
    """The second reading; what it finds was checked in the first."""
    errors = RowErrors()
    for number, row in enumerate(iterate_rows(str(path), key="RESPONSES")):
        line = _line(row, number, columns, errors)
        if line is None:
            raise InputError(f"{row.where}: the file changed while it was read")
        yield number, line


def without_evaluation(
    recipe: Recipe, path: Path, columns: Columns, facts: Facts, allowed: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """`allowed` [N] without labels on the recipe's evaluation prompts, and a note that names them.

    A label on a prompt that the run is measured on would make the measure worth less.
    """
    from align import prompts as sources

    tokenizer = load_tokenizer(recipe)
    held_out = {prompt.text for prompt in sources.load_prompts(recipe, tokenizer, None).eval}
    overlap: dict[int, str] = {}
    for number, line in _lines(path, columns):
        group = facts.groups[number]
        if not allowed[number] or group in overlap:
            continue
        given = sources.Item(line.where, line.prompt, None, None)
        if line.prompt in held_out or sources.render([given], recipe.prompts, tokenizer)[0] in held_out:
            overlap[group] = line.prompt
    if not overlap:
        return allowed, ()
    mine = np.isin(np.array(facts.groups), list(overlap))
    texts = list(overlap.values())[:SHOWN_PROMPTS]
    named = ", ".join(repr(text if len(text) <= 40 else f"{text[:37]}...") for text in texts)
    more = f" and {len(overlap) - SHOWN_PROMPTS} more" if len(overlap) > SHOWN_PROMPTS else ""
    note = (
        f"{int((mine & allowed).sum()):,} labels lie on {len(overlap):,} of the recipe's evaluation prompts and are "
        f"not shown to the ensemble: {named}{more}"
    )
    return allowed & ~mine, (note,)


def load_tokenizer(recipe: Recipe) -> Any:
    """The policy's tokenizer."""
    if recipe.policy.from_scratch is not None:
        from align.training.scratch import build_tokenizer

        return build_tokenizer(recipe.policy.from_scratch)
    from transformers import AutoTokenizer

    from align.model_files import resolve_model

    assert recipe.policy.model is not None
    path = resolve_model(recipe.policy.model, recipe.policy.revision)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"policy.model: {recipe.policy.model} has no tokenizer that can be read: {error}") from None


def _gold(recipe: Recipe, path: Path, columns: Columns, facts: Facts) -> tuple[np.ndarray, str | None]:
    """[N] of 1, 0 and NaN, and where it comes from: the file's column, else the recipe's gold verifier if it votes."""
    spec = recipe.evaluation.gold
    if columns.gold is not None:
        return np.array(facts.gold), f"column {columns.gold}"
    if spec is None or registry.kind_of(spec) != "binary":
        return np.array(facts.gold), None
    registry.check(spec, "evaluation.gold")
    table, _ = judge(recipe, (spec,), path, columns, facts)
    return table.values[:, 0].copy(), f"verifier {spec.name}"


def judge(
    recipe: Recipe, specs: Sequence[VerifierSpec], path: Path, columns: Columns, facts: Facts
) -> tuple[VerdictTable, list[Cost]]:
    """What each of `specs` says of every response, and what each cost."""
    column = {spec.name: j for j, spec in enumerate(specs)}
    values = np.full((len(facts.items), len(specs)), np.nan)
    failures: list[Counter[str]] = [Counter() for _ in specs]
    seconds, remembered = [0.0] * len(specs), [0] * len(specs)
    counted: Mapping[str, Mapping[str, float]] = {}
    answers: list[str] = [""] * len(facts.items) if recipe.ensemble.clusters > 1 else []
    models: dict[str, Any] = {}
    cache = _cache(recipe, specs)
    stage = f"verify {uuid4()}"  # of this command alone: what an earlier one was told counts as known

    def take(verdict: Verdict) -> None:
        j = column[verdict.verifier]
        seconds[j] += verdict.seconds
        if verdict.value is not None:
            values[int(verdict.sample_id), j] = verdict.value
            remembered[j] += cache is not None and verdict.seconds == 0.0
            return
        reason = verdict.reason or "no reason given"
        failures[j][reason if reason in failures[j] or len(failures[j]) < MOST_REASONS else OTHER_REASONS] += 1

    try:
        for spec in specs:
            if spec.kind in registry.IN_PROCESS:
                models[spec.name] = _model(recipe, spec)
        with VerifierPool(specs, seed=recipe.seed, in_process=models, cache=cache) as pool:
            for chunk in _chunks(path, columns, facts, _token_counter(recipe, specs), _template(recipe)):
                for verdict in pool.verify(chunk, stage):
                    take(verdict)
                for item in chunk if answers else ():
                    answers[int(item.sample_id)] = final_answer(item.response)
            counted = pool.costs()
    finally:
        for model in models.values():
            model.close()
        if cache is not None:
            cache.close()
    table = VerdictTable(
        values=values,
        names=tuple(column),
        kinds=tuple(registry.kind_of(spec) for spec in specs),
        families=tuple(spec.family or "" for spec in specs),
        prompts=np.array(facts.groups, dtype=np.int64),
        failures=tuple(dict(counter) for counter in failures),
        whole_prompts=tuple(registry.sees_whole_prompts(spec) for spec in specs),
        answers=tuple(answers),
    )
    known = [{"remembered": float(count)} if count else {} for count in remembered]
    return table, [Cost(seconds[j], {**counted.get(name, {}), **known[j]}) for name, j in column.items()]


def _cache(recipe: Recipe, specs: Sequence[VerifierSpec]) -> VerdictCache | None:
    """What slow verifiers said before, here and in the runs of the same directory; None where nothing is remembered."""
    if not recipe.verdict_cache:
        return None
    directory = Path(recipe.output_dir)
    return open_cache(specs, directory, recipe.policy.dtype, lambda: _policy_dir(recipe, "verdict_cache"), say)


def _model(recipe: Recipe, spec: VerifierSpec) -> Any:
    """The verifier that runs in this process; the policy before training where it needs that."""
    from align.launcher import apply_environment, loopback_environment, rank_environment

    apply_environment({**rank_environment(1), **loopback_environment()})
    from align.verifiers import in_process

    return in_process.build(spec, recipe.policy.dtype, lambda: _policy_dir(recipe, f"verifiers.{spec.name}.model"))


def _policy_dir(recipe: Recipe, where: str) -> Path:
    """The policy before training; refuses a recipe whose run makes it."""
    from align.model_files import resolve_model

    if recipe.policy.model is None:
        raise InputError(f"{where}: the policy is made by the run; name a model for the verifier that reads it")
    return resolve_model(recipe.policy.model, recipe.policy.revision)


def _token_counter(recipe: Recipe, specs: Sequence[VerifierSpec]) -> Callable[[str], int]:
    """A function from text to its number of tokens where a verifier looks at that; else one that says 0."""
    if not any(isinstance(spec, LengthSpec) and spec.unit == "tokens" for spec in specs):
        return lambda text: 0
    tokenizer = load_tokenizer(recipe)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _template(recipe: Recipe) -> Callable[[str], str] | None:
    """From a question to the prompt that the policy gets, where the recipe renders it by a chat template."""
    if not recipe.prompts.chat_template:
        return None
    from align import prompts as sources

    tokenizer = load_tokenizer(recipe)
    return lambda text: sources.render([sources.Item("RESPONSES", text, None, None)], recipe.prompts, tokenizer)[0]


def _chunks(
    path: Path, columns: Columns, facts: Facts, tokens: Callable[[str], int], template: Callable[[str], str] | None
) -> Iterator[list[Item]]:
    """Whole prompts, about `CHUNK_ITEMS` responses at a time; a prompt is complete at its last row."""
    ids = list(facts.prompts)
    waiting: dict[int, list[Item]] = {}
    ready: list[Item] = []
    for number, line in _lines(path, columns):
        group = facts.groups[number]
        item = Item(
            sample_id=str(number),
            prompt_id=ids[group],
            prompt=line.prompt if template is None else template(line.prompt),
            response=line.response,
            answer=line.answer,
            response_tokens=tokens(line.response),
            finish_reason="stop",
            columns=line.columns,
            turns=() if template is None else (("user", line.prompt),),
        )
        waiting.setdefault(group, []).append(item)
        if number == facts.last[group]:
            ready += waiting.pop(group)
        if len(ready) >= CHUNK_ITEMS:
            yield ready
            ready = []
    if ready:
        yield ready
