"""How much a recipe asks for: what each stage handles, and what lands on disk.  Upper bounds, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from align.memory import DTYPE_BYTES
from align.model_shape import ModelShape
from align.recipe import Recipe
from align.recipe_negative import looks_before, preflight_judge
from align.recipe_rl import greedy_per_prompt, questions_per_prompt
from align.training.deepspeed_config import effective_stage
from align.training.trainers import examples_per_round, steps_per_round

ROW_BYTES = 400
"""Ids, numbers and names of one sample with its score and pair, before compression."""
VERDICT_BYTES = 60
"""One verdict, before compression."""
COMPARISON_BYTES = 80
"""One answer of a judge about two responses, before compression."""


@dataclass(frozen=True)
class PromptFacts:
    """What is known of the prompts.

    Example: PromptFacts(train=18_000, eval=2_000, longest=8, read=True)
    """

    train: int | None  # None where the source was not read
    eval: int | None
    longest: int  # tokens, with those of its given answer beyond max_new_tokens; a bound where it was not read
    read: bool


@dataclass(frozen=True)
class Stage:
    """One stage, in the order of the run, with what one turn of it handles at most.

    Example: Stage("sample", times=3, counts={"prompts": 512, "samples": 4096, "tokens sampled": 65_536})
    """

    name: str
    times: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Store:
    """Bytes that one kind of artifact takes on disk at most.

    Example: Store("checkpoints", 41_000_000, "3 x (P 791,296 x 4 + T 791,296 x 8)", "training.keep_checkpoints")
    """

    name: str
    bytes: int
    formula: str
    knob: str


def plan_stages(recipe: Recipe, policy: ModelShape, facts: PromptFacts) -> tuple[Stage, ...]:
    """The stages in order, with what each handles at most."""
    sampling, training, rounds = recipe.sampling, recipe.training, recipe.rounds
    evaluation, gold = recipe.evaluation, int(recipe.evaluation.gold is not None)
    response = sampling.max_new_tokens
    samples = rounds.prompts_per_round * (sampling.samples_per_prompt + greedy_per_prompt(recipe))
    held_out = min(evaluation.prompts, facts.eval) if facts.eval is not None else evaluation.prompts
    eval_samples = held_out * evaluation.samples_per_prompt
    evaluations = len({r for r in range(rounds.count) if r % evaluation.every == 0}) + 1
    voters = len(recipe.verifiers)
    questions = rounds.prompts_per_round * questions_per_prompt(recipe)
    learnt = training.trainer.consumes  # pairs or scores
    examples, steps = examples_per_round(recipe), steps_per_round(recipe)
    if learnt == "pairs":
        tokens = examples * training.epochs * (facts.longest + 2 * response)
    else:  # whole groups: a prompt is computed once
        tokens = training.epochs * (rounds.prompts_per_round * facts.longest + examples * response)
    unit = "pairs" if learnt == "pairs" else "responses"
    learned = {unit: examples * training.epochs, "steps": steps, "tokens trained": tokens}
    if training.loss_facts.whole_step:  # a first pass over each step; KTO's is over others' responses, reference too
        learned["tokens looked at"] = tokens * (1 if learnt == "pairs" else 2)
    stages = []
    start = recipe.cold_start
    if start is not None:
        seen = start.steps * start.batch_size
        counts = {"examples": seen, "steps": start.steps, "tokens trained": seen * (facts.longest + response)}
        stages.append(Stage("cold start", 1, counts))
    measured = {
        "prompts": held_out,
        "samples": eval_samples,
        "tokens sampled": eval_samples * response,
        "verdicts": eval_samples * (voters + gold),
    }
    drawn = {"prompts": rounds.prompts_per_round, "samples": samples, "tokens sampled": samples * response}
    return (
        *stages,
        Stage("evaluate", evaluations, measured),
        *_preflight(recipe, facts),
        Stage("sample", rounds.count, drawn),
        *([Stage("compare", rounds.count, {"questions": questions})] if questions else []),
        Stage("verify", rounds.count, {"verdicts": samples * (voters + gold)}),
        Stage("combine", rounds.count, {"scores": samples}),
        *_rollouts(recipe),
        *([Stage("pair", rounds.count, {"pairs": examples})] if learnt == "pairs" else []),
        Stage("train", rounds.count, learned),
        Stage(
            "sync", rounds.count + 1, {"bytes to each sampler": policy.parameters * DTYPE_BYTES[recipe.policy.dtype]}
        ),
        Stage("export", 1, {}),
    )


def _preflight(recipe: Recipe, facts: PromptFacts) -> list[Stage]:
    """The look at pass@k before negative-only training."""
    if not looks_before(recipe):
        return []
    look = recipe.training.negative.preflight
    prompts = look.prompts if facts.eval is None else min(look.prompts, facts.eval)
    drawn = prompts * look.samples_per_prompt
    voters = 1 if preflight_judge(recipe) == "gold" else len(recipe.verifiers)
    counts = {"prompts": prompts, "samples": drawn, "tokens sampled": drawn * recipe.sampling.max_new_tokens}
    return [Stage("pre-flight", 1, {**counts, "verdicts": drawn * voters})]


def _rollouts(recipe: Recipe) -> list[Stage]:
    """What a builder of pairs draws beside the round's samples, before it is known how many are wrong."""
    builder, steps, sampling = recipe.pairs.builder, recipe.pairs.steps, recipe.sampling
    if recipe.training.trainer.consumes != "pairs" or builder not in ("per_step", "tree"):
        return []
    prompts, response = recipe.rounds.prompts_per_round, sampling.max_new_tokens
    if builder == "tree":
        places = prompts * steps.tree.iterations
        drawn = places * steps.tree.actions
        kept, tokens = drawn, drawn * response
    else:
        wrong = prompts * min(steps.wrong_per_prompt, sampling.samples_per_prompt)
        places = kept = wrong * min(steps.max_steps, response)
        drawn = places * steps.rollouts * steps.best_of
        tokens = drawn * response
    voters = 1 if steps.judge is not None else len(recipe.verifiers)
    counts = {"prefixes": places, "rollouts": drawn, "tokens sampled": tokens, "opinions": drawn * voters}
    return [Stage("rollouts", recipe.rounds.count, {**counts, "samples": kept})]


def plan_disk(recipe: Recipe, policy: ModelShape, facts: PromptFacts, stages: tuple[Stage, ...]) -> tuple[Store, ...]:
    """What lies in the run directory at its fullest: one checkpoint more than are kept, as the new one comes first."""
    b = DTYPE_BYTES[recipe.policy.dtype]
    p, t, training = policy.parameters, policy.trainable, recipe.training
    state = 8 if effective_stage(training, recipe.policy.dtype) == 0 else 12
    kept = min(training.keep_checkpoints + 1, recipe.rounds.count)
    written = p if recipe.policy.lora is None else t  # frozen weights are not written again
    if training.reference_sync is not None:
        written += p
    stores = []
    if recipe.policy.from_scratch is not None:
        stores.append(Store("new model", p * 4, f"P {p:,} x 4", "policy.from_scratch"))
    if recipe.cold_start is not None:
        stores.append(Store("cold start", p * 4, f"P {p:,} x 4", "policy.model"))
    critic = int(training.trainer.critic)  # as large as the policy, or nearly
    formula = f"{kept} x (weights {written:,} x {b} + T {t:,} x {state})" + (" x 2 (policy and critic)" * critic)
    size = kept * (written * b + t * state) * (1 + critic)
    stores.append(Store("checkpoints", size, formula, "training.keep_checkpoints or policy.lora"))
    stores.append(Store("export", p * b, f"P {p:,} x {b}", "policy.model"))
    samples = sum(s.times * s.counts.get("samples", 0) for s in stages)
    verdicts = sum(s.times * s.counts.get("verdicts", 0) for s in stages)
    per_sample = ROW_BYTES + 4 * facts.longest + 16 * recipe.sampling.max_new_tokens
    questions = sum(s.times * s.counts.get("questions", 0) for s in stages)
    size = samples * per_sample + verdicts * VERDICT_BYTES + questions * COMPARISON_BYTES
    formula = f"samples {samples:,} x {per_sample:,} + verdicts {verdicts:,} x {VERDICT_BYTES}"
    formula += f" + questions {questions:,} x {COMPARISON_BYTES}" * bool(questions)
    stores.append(Store("artifacts", size, f"{formula}, before compression", "rounds, sampling.samples_per_prompt"))
    return tuple(stores)
