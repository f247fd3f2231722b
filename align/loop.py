"""The on-policy loop.

    prompts -> sample (vLLM) -> verify -> combine -> pair -> train (DeepSpeed) -> sync weights -+
       ^                                                                                        |
       +------------------------------- next round, new policy --------------------------------+
                                  evaluate -> export (Hugging Face)

Every rank runs this file.  Stages are function calls; between them lie committed artifacts, so each stage
first asks the store whether its work is already done.  That one question is the whole of resuming.  A trainer that
learns from scores has no pair stage; `align.stages.ROUND` says which stages a round has.  Where a trainer's own rule
ends training for good, the rounds that are left are not begun.
"""

from __future__ import annotations

from collections.abc import Callable

from align import distributed
from align.errors import InputError
from align.faults import reach
from align.recipe import Recipe
from align.run import Run
from align.stages import ROUND, evaluate, export, pair, sample, score, train


def run_loop(run: Run) -> None:
    """Turn the loop from wherever the run directory says it stands, then evaluate and export."""
    if run.store.finished:
        run.say(f"{run.store.root} is finished; nothing to do. A changed recipe needs another `name`.")
        return
    run.plan()
    rounds = run.recipe.rounds.count
    for round_index in range(run.version, rounds):
        if run.stopped:
            run.say(f"the run ends after {round_index} of {rounds} rounds: {run.stopped}")
            break
        if round_index % run.recipe.evaluation.every == 0:
            evaluate(run, round_index)
        for stage in ROUND[run.recipe.training.trainer.consumes]:
            stage(run, round_index)
            reach(f"loop.{stage.__name__}.after")
            run.write_summary("running")
    evaluate(run, run.version)
    reach("loop.export.before")
    export(run)
    run.write_summary("done")
    run.report()


def run_stage(run: Run, stage: Callable[[Run, int], object], round_index: int | None) -> None:
    """One stage of one round, for the verbs: `align sample`, `align score` …

    Raises InputError where the round is ahead of the policy: its weights do not exist yet.
    """
    current = run.version
    wanted = current if round_index is None else round_index
    if wanted < 0:
        raise InputError(f"--round {wanted}: rounds are counted from 0")
    if wanted > current:
        raise InputError(
            f"--round {wanted}: the run stands at round {current}; train round {current} first (`align train`)"
        )
    if run.stopped and wanted == current and stage is not evaluate:
        raise InputError(f"training has ended: {run.stopped}; `align evaluate` and `align export` are left")
    last = run.recipe.rounds.count - (stage is not evaluate)
    if wanted > last and round_index is None:
        raise InputError("every round of the recipe is trained; `align evaluate` and `align export` are left")
    if wanted > last:
        raise InputError(f"--round {wanted}: the recipe's last round is {last} (rounds.count)")
    if stage is pair and pair not in ROUND[run.recipe.training.trainer.consumes]:
        raise InputError(
            f"{run.recipe.training.algorithm} learns from scores and builds no pairs; go on with `align train`"
        )
    if _committed(run, stage, wanted):
        run.say(f"round {wanted}: {stage.__name__} is done already")
    stage(run, wanted)
    if not run.store.finished:
        run.write_summary("running")


def _committed(run: Run, stage: Callable[[Run, int], object], round_index: int) -> bool:
    """Whether the verb has nothing left to do."""
    if stage is train:
        return run.version > round_index
    if stage is evaluate:
        return run.store.read_json(round_index, "evaluation") is not None
    artifact = {"sample": "samples", "score": "scores", "pair": "pairs"}[stage.__name__]
    return run.store.stage_done(round_index, artifact)


STAGES: dict[str, Callable[[Run, int], object]] = {
    "sample": sample,
    "score": score,
    "pair": pair,
    "train": train,
    "evaluate": evaluate,
}


GOES_ON = ("score", "pair", "train")
"""Verbs that need what an earlier one made: they begin no run."""


def run_verb(recipe: Recipe, verb: str, round_index: int | None = None) -> int:
    """What `align VERB` does on this rank; returns the exit status.  Collective: every rank calls it."""
    ranks = distributed.connect(recipe.rank_timeout_s)
    try:
        with Run.open(recipe, ranks, allow_new=verb not in GOES_ON) as run:
            if verb == "run":
                run_loop(run)
            elif verb == "export":
                export(run)
                if not run.store.finished:
                    run.write_summary("running")
            else:
                run_stage(run, STAGES[verb], round_index)
    finally:
        distributed.close(ranks)
    return 0
