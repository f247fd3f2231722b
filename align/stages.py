"""The stages: each reads committed artifacts, does one thing, and commits what it made.

A stage is a function of (run, round).  It returns at once where its artifact is committed, so calling it again
is free and a resumed run redoes only what was pending.  Work is split over ranks by shard, and a shard's content
depends on its prompts alone, not on which rank drew it or on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from align.comparing import compare
from align.ensemble.calibrate import PairProbability
from align.ensemble.combine import to_scores
from align.ensemble.table import from_records
from align.errors import InputError, NotFiniteError, RunError
from align.evaluation.metrics import evaluate as measure
from align.evaluation.report import ensemble_report
from align.labels import combine_told, told, unseen, verify_labels
from align.pairs import BUILDERS, PairReport, build_pairs
from align.prefix_values import STEP_BUILDERS, PairStage
from align.preflight import preflight, settled
from align.progress import track
from align.recipe import Recipe
from align.recipe_rl import greedy_per_prompt
from align.records import Given, Prompt, Sample, Verdict
from align.resampling import plan_resampling
from align.summary import verifier_rows
from align.verifiers.base import Item
from align.verifiers.runner import count_reasons

if TYPE_CHECKING:
    from align.run import Run

Row = TypeVar("Row")


def sample(run: Run, round_index: int) -> None:
    """Draw `samples_per_prompt` responses for the round's prompts from the policy as it is now."""
    if round_index == 0:
        preflight(run)
    with run.timed("sample"):
        _sample_shards(run, round_index, "train", run.round_prompts(round_index))


def _sample_shards(run: Run, round_index: int, purpose: Literal["train", "eval"], prompts: Sequence[Prompt]) -> None:
    """Sample the shards that are not committed yet, in turn over the ranks, and commit the stage."""
    store, ranks, recipe = run.store, run.ranks, run.recipe
    stage = "samples" if purpose == "train" else "eval_samples"
    settings = recipe.sampling if purpose == "train" else recipe.evaluation
    if store.stage_done(round_index, stage):
        return _check_cut(run, round_index, stage)
    if round_index != run.version:
        raise InputError(
            f"round {round_index} has no {stage}, and the policy stands at round {run.version}: the weights that would "
            "have to draw them are gone"
        )
    shards = _shards(prompts, recipe.sampling.prompts_per_shard)
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(round_index, stage, i)])
    sampler = run.synced_sampler() if pending else None
    with ranks.stage(stage):
        mine = pending[ranks.rank :: ranks.world_size]
        label, total = f"round {round_index}: {purpose} samples", sum(len(shards[i]) for i in mine)
        with track(label, total=total, unit="prompts") as bar:
            for i in mine:
                assert sampler is not None
                rows = sampler.sample(
                    run.control().sampled(shards[i], run.version),
                    policy_version=run.version,
                    n=settings.samples_per_prompt,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    purpose=purpose,
                    seed=recipe.seed,
                    greedy=greedy_per_prompt(recipe) if purpose == "train" else 0,
                )
                store.commit_shard(round_index, stage, i, rows)
                bar.advance(len(shards[i]))
    store.commit_stage(round_index, stage, len(shards))
    _check_cut(run, round_index, stage)


def _check_cut(run: Run, round_index: int, stage: str) -> None:
    """Keep how many responses hit the length limit, and stop above the recipe's share."""
    samples = run.read(round_index, stage)
    cut = sum(s.finish_reason == "length" for s in samples)
    share = cut / len(samples)
    run.keep(
        round_index,
        f"{stage}_report",
        {
            "samples": len(samples),
            "greedy": sum(s.temperature == 0.0 for s in samples),
            "tokens": sum(len(s.response_ids) for s in samples),
            "cut": cut,
        },
    )
    if cut:
        run.say(
            f"round {round_index}: {cut} of {len(samples)} responses ({stage}) reached the limit of "
            f"{run.recipe.sampling.max_new_tokens} tokens"
        )
    if share > run.recipe.sampling.max_cut_fraction:
        raise RunError(
            f"round {round_index}: {cut} of {len(samples)} responses were cut at sampling.max_new_tokens; "
            f"raise it, or raise sampling.max_cut_fraction ({run.recipe.sampling.max_cut_fraction})"
        )


def score(run: Run, round_index: int) -> None:
    """Ask every verifier about every sample, then combine the verdicts into P(good) and a reward.

    A judge that says who of two responses wins is asked first.  The gold verifier's verdicts are an artifact of their
    own: the ensemble never reads them.
    """
    run.require(round_index, "samples", "align sample")
    prompts = {p.id: p for p in run.round_prompts(round_index)}
    compare(run, round_index, prompts)
    with run.timed("verify"):
        _verify_shards(run, round_index, "samples", "verdicts", prompts)
        verify_labels(run)
        if run.recipe.evaluation.gold is not None:
            _verify_shards(run, round_index, "samples", "gold", prompts)
    if run.store.stage_done(round_index, "scores"):
        return
    accounts = run.ranks.gather(run.verifier_pool(gold=False).costs())
    with run.timed("combine"), run.ranks.stage("combine"):
        if run.ranks.rank == 0:
            _combine(run, round_index, accounts)
    run.store.commit_stage(round_index, "scores", 1)


def _verify_shards(run: Run, round_index: int, source: str, stage: str, prompts: dict[str, Prompt]) -> None:
    """Verify the shards of `source` whose verdicts are not committed yet."""
    store, ranks = run.store, run.ranks
    if store.stage_done(round_index, stage):
        return
    shards = _shards(run.read(round_index, source), run.samples_per_shard(source))
    pending = ranks.broadcast([i for i in range(len(shards)) if not store.shard_done(round_index, stage, i)])
    with ranks.stage(stage):
        pool = run.verifier_pool(gold=stage.endswith("gold"))
        mine = pending[ranks.rank :: ranks.world_size]
        with track(f"round {round_index}: {stage}", total=sum(len(shards[i]) for i in mine), unit="samples") as bar:
            for i in mine:
                store.commit_shard(
                    round_index,
                    stage,
                    i,
                    pool.verify(items(shards[i], prompts), f"{run.recipe.name}/{round_index}/{stage}"),
                )
                bar.advance(len(shards[i]))
    store.commit_stage(round_index, stage, len(shards))


def items(samples: Sequence[Sample], prompts: dict[str, Prompt]) -> list[Item]:
    """Samples as the verifiers see them."""
    return [
        Item(
            sample_id=s.id,
            prompt_id=s.prompt_id,
            prompt=prompts[s.prompt_id].text,
            response=s.text,
            answer=prompts[s.prompt_id].answer,
            response_tokens=len(s.response_ids),
            finish_reason=s.finish_reason,
            columns=prompts[s.prompt_id].columns,
            turns=prompts[s.prompt_id].turns,
        )
        for s in samples
    ]


def _combine(run: Run, round_index: int, accounts: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Rank 0: verdicts to scores, and the report of how the ensemble did against gold where gold is known."""
    samples = run.read(round_index, "samples")
    verdicts: list[Verdict] = run.read(round_index, "verdicts")
    table = from_records(samples, verdicts, run.recipe.verifiers)
    known = told(run, round_index)
    combined = combine_told(run, samples, verdicts, run.recipe.verifiers, known)
    scores, counts = to_scores(samples, combined, run.recipe.ensemble.min_voters)
    run.store.commit_shard(round_index, "scores", 0, scores)
    gold = unseen(run.gold_values(round_index, "gold", samples), samples, known)
    run.keep(
        round_index,
        "ensemble",
        {
            "method": combined.method,
            "why": combined.why,
            "warnings": list(combined.warnings),
            "class_balance": combined.class_balance,
            "diagnostics": dict(combined.diagnostics),
            "counts": counts,
            "labels": None if known is None else dict(known.report),
            "verifiers": verifier_rows(combined.estimates, verdicts, accounts),
            "on_gold": None if gold is None else ensemble_report(table, combined, gold),
            "resampling": plan_resampling(combined.p_good, table.prompts),
            "pair_correlation": combined.pairs.correlation,
        },
    )
    for warning in combined.warnings:
        run.say(f"round {round_index}: {warning}")
    for name, reasons in count_reasons(verdicts).items():
        if reasons:
            listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            run.say(f"round {round_index}: {name} gave no verdict on {reasons.total()} of {len(samples)}: {listed}")


def pair(run: Run, round_index: int) -> None:
    """Scored samples to preference pairs; says which step lost them where none is left."""
    run.require(round_index, "scores", "align score")
    store = run.store
    if store.stage_done(round_index, "pairs"):
        return
    builder = PAIR_STAGES[run.recipe.pairs.builder]
    with run.timed("pair"):
        builder.prepare(run, round_index)
        with run.ranks.stage("pair"):
            if run.ranks.rank == 0:
                report, made = builder.build(run, round_index)
                for stage in builder.makes:
                    store.commit_shard(round_index, stage, 0, made)
                store.commit_shard(round_index, "pairs", 0, report.pairs)
                gap, explain = report.length_gap_tokens, report.explain()
                told = {"counts": report.counts, "length_gap_tokens": gap, "explain": explain}
                run.keep(round_index, "pairing", told)
                run.say(f"round {round_index}: {explain}")
    for stage in (*builder.makes, "pairs"):
        if not store.stage_done(round_index, stage):
            store.commit_stage(round_index, stage, 1)


def _pair_responses(run: Run, round_index: int) -> tuple[PairReport, list[Sample]]:
    """Pairs of whole responses; they name no sample that was not drawn."""
    samples = {s.id: s for s in run.read(round_index, "samples")}
    chances = PairProbability(run.kept(round_index, "ensemble")["pair_correlation"])
    return build_pairs(run.read(round_index, "scores"), samples, run.recipe.pairs, chances), []


PAIR_STAGES: dict[str, PairStage] = {
    **{name: PairStage(lambda run, round_index: None, _pair_responses) for name in BUILDERS},
    **STEP_BUILDERS,
}
"""How each `pairs.builder` makes its pairs."""


def train(run: Run, round_index: int) -> None:
    """One round of training with the recipe's trainer, then a checkpoint: the policy's next version."""
    from align.training.trainers import RoundData, steps_per_round, train_round

    if run.version > round_index:
        return
    recipe = settled(run.recipe, run.store.read_json(0, "preflight"))
    consumes = recipe.training.trainer.consumes
    run.require(round_index, consumes, "align pair" if consumes == "pairs" else "align score")
    rows = run.read(round_index, consumes)
    if not rows:
        _empty_round(run, round_index)
    policy = run.policy()
    with run.timed("train"), run.ranks.stage("train"):
        if rows:
            data = RoundData(
                round_index,
                samples={s.id: s for stage in _sample_stages(recipe) for s in run.read(round_index, stage)},
                scores=rows if consumes == "scores" else (),
                pairs=rows if consumes == "pairs" else (),
                dispreferred=_dispreferred(run, recipe, round_index),
                read=lambda stage: run.read(round_index, stage),
            )
            steps = steps_per_round(recipe, len(rows))
            with track(f"round {round_index}: train", total=steps, unit="steps") as bar:

                def on_step(row: dict[str, Any]) -> None:
                    run.append_metrics(row)
                    bar.advance()

                try:
                    report = train_round(policy, data, recipe, on_step)
                except NotFiniteError as error:  # the message has room for the first samples only
                    run.store.commit_json(None, "not_finite", {"round": round_index, **error.report})
                    raise
            for warning in report.warnings:
                run.say(f"round {round_index}: {warning}")
            if report.stopped:
                run.say(f"round {round_index}: training has ended: {report.stopped}")
            elif not report.steps:
                _empty_round(run, round_index, report.counts)
            run.keep(round_index, "training", asdict(report))
    with run.timed("checkpoint"):
        policy.version = round_index + 1
        with run.store.commit_checkpoint(policy.version) as directory:
            policy.save(directory)


def _sample_stages(recipe: Recipe) -> tuple[str, ...]:
    """The artifacts that hold what a trainer's rows name."""
    made = PAIR_STAGES[recipe.pairs.builder].makes if recipe.training.trainer.consumes == "pairs" else ()
    return ("samples", *made)


def _dispreferred(run: Run, recipe: Recipe, round_index: int) -> dict[str, Given]:
    """By prompt id, the bad answers that the prompt source brings along; read only where the recipe names them."""
    if recipe.training.negative.dispreferred_column is None:
        return {}
    return {p.id: p.dispreferred for p in run.round_prompts(round_index) if p.dispreferred is not None}


def _empty_round(run: Run, round_index: int, left_out: Mapping[str, int] | None = None) -> None:
    """A round with nothing to learn from stops the run or is passed over, as the recipe says."""
    if run.recipe.training.trainer.consumes == "pairs":
        what, explain = "not one usable pair", run.kept(round_index, "pairing")["explain"]
    else:
        counts = {k: v for k, v in (left_out or {}).items() if v}
        told = ", ".join(f"{v} {k}" for k, v in counts.items()) or "no response had a score"
        what, explain = "not one usable response", f"left out: {told}"
    if run.recipe.rounds.on_empty == "stop":
        raise RunError(
            f"round {round_index}: {what}: {explain}. Mend the verifiers or what the recipe leaves out, "
            "or set rounds.on_empty: continue"
        )
    run.say(f"round {round_index}: {what}, so nothing is trained: {explain}")


ROUND: dict[str, tuple[Callable[[Run, int], None], ...]] = {
    "pairs": (sample, score, pair, train),
    "scores": (sample, score, train),
}
"""The stages of a round, by what the recipe's trainer learns from."""


def evaluate(run: Run, version: int) -> None:
    """Measure the policy on held-out prompts: gold accuracy, pass@k, verifiers, KL, entropy, length."""
    store, settings = run.store, run.recipe.evaluation
    if store.read_json(version, "evaluation") is not None:
        return
    prompts = run.eval_prompts()
    by_id = {p.id: p for p in prompts}
    with run.timed("evaluate"):
        _sample_shards(run, version, "eval", prompts)
        _verify_shards(run, version, "eval_samples", "eval_verdicts", by_id)
        if settings.gold is not None:
            _verify_shards(run, version, "eval_samples", "eval_gold", by_id)
        samples = run.read(version, "eval_samples")
        stats = run.sequence_stats(samples)
        with run.ranks.stage("evaluate"):
            if run.ranks.rank == 0:
                metrics = measure(
                    samples,
                    run.read(version, "eval_verdicts"),
                    run.read(version, "eval_gold") if settings.gold is not None else None,
                    stats,
                    settings,
                    names=[v.name for v in run.recipe.verifiers],
                )
                run.keep(version, "evaluation", metrics)
        run.ranks.barrier("evaluate")
    run.say_evaluation(version)


def export(run: Run) -> None:
    """Write the Hugging Face checkpoint, load it again in transformers and vLLM, and compare before committing.

    The policy after the last round goes to `export/`; an earlier one, asked for by the verb, to `export-<version>/`.
    """
    from align.export import export as write_export

    name = "export" if run.trained else f"export-{run.version:05d}"
    if run.store.verify_directory(name) is None:
        with run.timed("export"):
            write_export(
                run.policy(),
                run.store,
                run.recipe,
                name=name,
                card=run.model_card(),
                probes=run.probes(),
                on_checked=lambda report: run.keep(None, f"{name}_report", report),
            )
    run.say(f"exported to {run.store.root / name}")


def _shards(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """Consecutive slices of `size` rows, the last one shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
