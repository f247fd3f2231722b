"""Labels in the loop: responses of which it is known whether they are good, for the ensemble's gate and calibration.

They come from a file, whose responses the verifiers judge once, in round 0, and from the gold verdicts on a few
prompts of each round.  Gold on any other prompt is never read here.  A file that holds an evaluation prompt is
refused, because a label there would make the evaluation worth less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from align import prompts as sources
from align.ensemble.combine import Combined, combine
from align.ensemble.table import from_records
from align.prompt_sources import Row, RowErrors, read_rows, text_of
from align.records import Sample, Verdict, content_id
from align.verifiers.base import Item
from align.verifiers.registry import sees_whole_prompts
from align.verifiers.spec import VerifierSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.prompts import PromptSet
    from align.recipe import Recipe
    from align.run import Run

KEY = "ensemble.labels.file"
STAGE = "label_verdicts"
FEW = 8  # fewer labels cannot tell one label model from another
_YES, _NO = (1, "1", "1.0", "true", "True"), (0, "0", "0.0", "false", "False")
_ALONE = "judges a response by the prompt's others, and a label file has not all of them"


@dataclass(frozen=True)
class Labelled:
    """The responses of a label file.

    Example: Labelled((Item("5c…", "3f…", "1+2=", "3", "3", 1, "stop"),), (True,), {"rows": 1, "good": 1, …})
    """

    items: tuple[Item, ...] = ()
    good: tuple[bool, ...] = ()
    report: Mapping[str, int] | None = None


def read_labels(recipe: Recipe, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase) -> Labelled:
    """The recipe's label file, rendered as its prompts are; InputError names every bad row.

    A prompt that is a training prompt as it stands is not rendered again.
    """
    path = recipe.ensemble.labels.file
    if path is None:
        return Labelled()
    train, held_out = {p.text: p for p in prompts.train}, {p.text for p in prompts.eval}
    errors, good, repeated = RowErrors(), dict[str, bool](), 0
    items: list[Item] = []
    for row in read_rows(path, columns=("prompt", "response", "label"), key=KEY):
        text, response, label = _row(row, errors)
        if text is None or response is None or label is None:
            continue
        asked = text
        if text not in train and text not in held_out:
            text = sources.render([sources.Item(row.where, text, None, None)], recipe.prompts, tokenizer)[0]
        if text in held_out:
            errors.add(f"{row.where}: prompt: {text[:40]!r} is an evaluation prompt of this recipe; take it out")
            continue
        item = _item(row, text, response, tokenizer, errors)
        known = train.get(text)
        if known is not None:
            item = replace(item, answer=item.answer or known.answer, columns=known.columns, turns=known.turns)
        elif recipe.prompts.chat_template:
            item = replace(item, turns=sources.turns_of(asked))
        if item.sample_id not in good:
            items.append(item)
        elif good[item.sample_id] is label:
            repeated += 1
        else:
            errors.add(f"{row.where}: label: the same response to the same prompt has the other label further up")
        good[item.sample_id] = label
    errors.check()
    found = [good[item.sample_id] for item in items]
    counts = {
        "rows": len(items), "good": sum(found), "prompts": len({i.prompt_id for i in items}), "duplicates": repeated,
    }  # fmt: skip
    return Labelled(tuple(items), tuple(found), counts)


def _row(row: Row, errors: RowErrors) -> tuple[str | None, str | None, bool | None]:
    """Prompt, response and label; None, or an error more, where one is wrong.  An empty response is a response."""
    prompt = text_of(row, "prompt", errors)
    response = "" if row.values.get("response") == "" else text_of(row, "response", errors)
    value = row.values.get("label")
    if value not in (*_YES, *_NO):
        errors.add(f"{row.where}: label: {str(value)[:40]!r} is not 1 or 0")
        return prompt, response, None
    return prompt, response, value in _YES


def _item(row: Row, text: str, response: str, tokenizer: PreTrainedTokenizerBase, errors: RowErrors) -> Item:
    answer = None
    if row.values.get("answer") not in (None, ""):
        answer = text_of(row, "answer", errors, integers=True)
    tokens = len(tokenizer(response, add_special_tokens=False)["input_ids"])
    return Item(content_id("label", text, response), content_id(text), text, response, answer, tokens, "stop")


def verify_labels(run: Run) -> None:
    """Let the verifiers judge the label file, once in a run; its verdicts stand among those of round 0."""
    rows, store, ranks = run.labelled().items, run.store, run.ranks
    if not rows or store.stage_done(0, STAGE):
        return
    size = run.samples_per_shard("samples")
    shards = [rows[i : i + size] for i in range(0, len(rows), size)]
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(0, STAGE, i)])
    with ranks.stage(STAGE):
        pool = run.verifier_pool(gold=False)
        for i in pending[ranks.rank :: ranks.world_size]:
            store.commit_shard(0, STAGE, i, pool.verify(shards[i], f"{run.recipe.name}/0/{STAGE}"))
    store.commit_stage(0, STAGE, len(shards))


def shown_prompts(prompt_ids: Sequence[str], count: int, seed: int) -> set[str]:
    """The prompts whose gold the ensemble may see: the first `count` of these by a hash."""
    return set(sorted(set(prompt_ids), key=lambda name: content_id("shown", seed, name))[:count])


def shown_gold(samples: Sequence[Sample], gold: Sequence[Verdict], prompts: set[str]) -> dict[str, bool]:
    """By sample id, whether gold calls it good: of the samples that answer one of `prompts`, and of no other."""
    may = {s.id for s in samples if s.prompt_id in prompts}
    return {v.sample_id: v.value > 0.5 for v in gold if v.sample_id in may and v.value is not None}


@dataclass(frozen=True)
class Told:
    """What the ensemble was told in a round.

    Example: Told({"9c…": True}, {"labels": 1, "good": 1, "prompts": 1, "from_gold": 1, "from_file": 0}, ("one …",))
    """

    labels: Mapping[str, bool]
    report: Mapping[str, int]
    warnings: tuple[str, ...]


def told(run: Run, round_index: int) -> Told | None:
    """The labels of this round, from the file and from gold; None where the recipe allows none."""
    settings = run.recipe.ensemble.labels
    if not settings.changed():
        return None
    samples, file = run.read(round_index, "samples"), run.labelled()
    labels: dict[str, bool] = {}
    prompts: set[str] = set()
    if settings.prompts:
        chosen = shown_prompts([s.prompt_id for s in samples], settings.prompts, run.recipe.seed)
        labels = shown_gold(samples, run.read(round_index, "gold"), chosen)
        prompts = {s.prompt_id for s in samples if s.id in labels}
    from_gold = len(labels)
    labels |= {item.sample_id: good for item, good in zip(file.items, file.good, strict=True)}
    counts = {
        "labels": len(labels),
        "good": sum(labels.values()),
        "prompts": len(prompts | {item.prompt_id for item in file.items}),
        "from_gold": from_gold,
        "from_file": len(labels) - from_gold,
    }
    return Told(labels, counts, label_warnings(counts["labels"], counts["good"]))


def label_warnings(count: int, good: int) -> tuple[str, ...]:
    """What labels cannot do: too few of them, or all of one class."""
    if count == 0:
        return ("ensemble.labels: no response of this round has a label",)
    if good in (0, count):
        every = "the only label says" if count == 1 else f"all {count} labels say"
        which = "good" if good else "bad"
        return (f"ensemble.labels: {every} {which}; it takes both kinds to choose a label model or calibrate one",)
    if count < FEW:
        return (f"ensemble.labels: {count} labels are too few to choose a label model; it takes {FEW}",)
    return ()


def combine_told(
    run: Run, samples: Sequence[Sample], verdicts: Sequence[Verdict], specs: Sequence[VerifierSpec], known: Told | None
) -> Combined:
    """P(good) of these samples; the responses of the label file stand beside them in the fit."""
    if known is None:
        return combine(from_records(samples, verdicts, specs), run.recipe.ensemble)
    file = run.labelled()
    extra = [_as_sample(item) for item in file.items]
    names = {spec.name for spec in specs}
    judged = [v for v in run.store.read(0, STAGE) if v.verifier in names] if extra else []
    aside = {spec.name for spec in specs if sees_whole_prompts(spec)}
    judged = [replace(v, value=None, reason=_ALONE) if v.verifier in aside else v for v in judged]
    table = from_records([*samples, *extra], [*verdicts, *judged], specs)
    combined, count = combine(table, run.recipe.ensemble, known.labels or None), len(samples)
    return replace(
        combined,
        p_good=combined.p_good[:count],
        reward=combined.reward[:count],
        spread=combined.spread[:count],
        voters=combined.voters[:count],
        warnings=(*combined.warnings, *known.warnings),
    )


def unseen(gold: Sequence[float | None] | None, samples: Sequence[Sample], known: Told | None) -> Any:
    """Gold without what the ensemble was told, so that a report on gold does not count what it was given."""
    if gold is None or known is None:
        return gold
    return [None if s.id in known.labels else value for s, value in zip(samples, gold, strict=True)]


def _as_sample(item: Item) -> Sample:
    """A response of the file in the form that the table takes; it was drawn by no policy."""
    return Sample(
        item.sample_id, item.prompt_id, 0, 0, 0, (), (), (), item.response, item.finish_reason, 0.0, 1.0, 0, 0
    )  # fmt: skip
