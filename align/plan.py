"""`align plan`: what a recipe will do and need, worked out without loading a model, and refused where it cannot fit.

Counts are upper bounds: a response may end before `max_new_tokens`, and a prompt may give no pair.  Memory is in
`align.memory`, the model's numbers in `align.model_shape`, the machine's in `align.machine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.inputs import check_inputs
from align.machine import Machine, find_machine, free_disk
from align.memory import GIB, Part, cold_start_parts, memory_parts
from align.model_shape import ModelShape, config_shape, load_config, policy_shape
from align.recipe import Recipe
from align.training.deepspeed_config import deepspeed_config
from align.verifiers.spec import RewardModelSpec
from align.workload import PromptFacts, Stage, Store, plan_disk, plan_stages

if TYPE_CHECKING:
    from align.prompts import PromptSet

DEFAULT_CONTEXT = 2048
"""Context of a model whose config.json names none, as in vLLM."""


@dataclass(frozen=True)
class Plan:
    """Everything that `align plan` prints."""

    recipe: str
    ranks: int
    policy: ModelShape
    machine: Machine
    prompts: PromptFacts
    context: int
    stages: tuple[Stage, ...]
    cold_start: tuple[Part, ...]  # memory while it lasts, before trainer and sampler start; empty without one
    memory: tuple[Part, ...]
    disk: tuple[Store, ...]
    disk_free: int | None  # None for a machine that is not this one
    notes: tuple[str, ...]

    def device_bytes(self) -> int:
        """Memory one rank needs on its device in the rounds; on a CPU this is all of it."""
        return sum(p.bytes for p in self.memory if p.place == "device" or self.machine.kind == "cpu")

    def host_bytes(self) -> int:
        """Main memory one rank needs beside its GPU; 0 on a CPU, where the device is main memory."""
        return sum(p.bytes for p in self.memory if p.place == "host" and self.machine.kind != "cpu")

    def cold_start_bytes(self) -> int:
        """Memory one rank needs on its device during the cold start."""
        return sum(p.bytes for p in self.cold_start)

    def disk_bytes(self) -> int:
        """Disk the run needs at its fullest."""
        return sum(s.bytes for s in self.disk)

    def total(self, count: str) -> int:
        """One count, such as `tokens sampled`, over all stages and rounds."""
        return sum(stage.times * stage.counts.get(count, 0) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain dictionaries, with its totals, for plan.json."""
        totals = {
            "device_bytes": self.device_bytes(),
            "host_bytes": self.host_bytes(),
            "cold_start_bytes": self.cold_start_bytes(),
            "disk_bytes": self.disk_bytes(),
            **{name.replace(" ", "_"): self.total(name) for name in ("tokens sampled", "tokens trained", "steps")},
        }
        return {**asdict(self), "totals": totals}


def make_plan(
    recipe: Recipe, ranks: int = 1, *, prompts: PromptSet | None = None, machine: Machine | None = None
) -> Plan:
    """Work out the plan and refuse it where it cannot fit; every reason at once.

    `prompts` saves reading the source again; `machine` plans for another machine than this one.
    Raises InputError for a missing model, a bad prompt source, and whatever exceeds context, memory or disk.
    """
    check_inputs(recipe, download=False)
    deepspeed_config(recipe.training, recipe.policy.dtype, ranks)
    policy = policy_shape(recipe.policy)
    context = _context(recipe, policy)
    facts = _prompt_facts(recipe, policy, context, prompts)
    machine = machine or find_machine(ranks)
    longest = facts.longest + recipe.sampling.max_new_tokens
    limit = recipe.prompts.max_tokens
    memory = memory_parts(
        recipe,
        policy,
        reward_shapes(recipe),
        machine,
        ranks=ranks,
        longest=longest,
        context=context if limit is None else min(context, limit + recipe.sampling.max_new_tokens),
    )
    stages = plan_stages(recipe, policy, facts)
    plan = Plan(
        recipe=recipe.name,
        ranks=ranks,
        policy=policy,
        machine=machine,
        prompts=facts,
        context=context,
        stages=stages,
        cold_start=cold_start_parts(recipe, policy, machine, ranks=ranks, longest=longest),
        memory=memory,
        disk=plan_disk(recipe, policy, facts, stages),
        disk_free=free_disk(Path(recipe.output_dir)) if machine.here else None,
        notes=(),
    )
    problems = find_problems(plan)
    if problems:
        raise InputError("\n".join(problems))
    return replace(plan, notes=find_notes(recipe, plan))


def reward_shapes(recipe: Recipe) -> list[tuple[RewardModelSpec, ModelShape]]:
    """Every reward model with its shape, the gold verifier's too."""
    gold = recipe.evaluation.gold
    specs = [*recipe.verifiers, *([gold] if gold is not None else [])]
    found = []
    for spec in specs:
        if isinstance(spec, RewardModelSpec):
            config = load_config(spec.model, spec.revision, key=f"verifiers.{spec.name}.model")
            found.append((spec, config_shape(config, spec.model, classifier=True)))
    return found


def _context(recipe: Recipe, policy: ModelShape) -> int:
    """Longest prompt and response together; refuses a response that leaves no room for a prompt."""
    context = policy.context or DEFAULT_CONTEXT
    limit = recipe.sampling.engine.get("max_model_len")
    source = "the model's context"
    if limit is not None and int(limit) < context:
        context, source = int(limit), "sampling.engine.max_model_len"
    sampling, most = recipe.sampling, recipe.prompts.max_tokens
    if sampling.max_new_tokens >= context:
        raise InputError(
            f"sampling.max_new_tokens: {sampling.max_new_tokens} leaves no room for a prompt in {source} of {context} "
            f"tokens; lower it to {context - 1} or less"
        )
    if most is not None and most + sampling.max_new_tokens > context:
        raise InputError(
            f"prompts.max_tokens: {most} and sampling.max_new_tokens: {sampling.max_new_tokens} together exceed "
            f"{source} of {context} tokens; lower one of them by {most + sampling.max_new_tokens - context}"
        )
    return context


def _prompt_facts(recipe: Recipe, policy: ModelShape, context: int, prompts: PromptSet | None) -> PromptFacts:
    """Read and tokenise the prompts, unless they lie on the hub: then only their bound is known."""
    if prompts is None and recipe.prompts.source.startswith("hub:"):
        bound = recipe.prompts.max_tokens or min(context - recipe.sampling.max_new_tokens, DEFAULT_CONTEXT)
        return PromptFacts(None, None, bound, read=False)
    from align.prompts import load_prompts, round_prompts

    if prompts is None:
        prompts = load_prompts(recipe, _tokenizer(recipe), policy.context)
    round_prompts(prompts.train, 0, recipe.rounds.prompts_per_round, recipe.seed)  # refuses more than there are
    response = recipe.sampling.max_new_tokens  # a longer given answer takes the rest of its room with the prompt
    over = {p.id: max(0, len(p.dispreferred.response_ids) - response) for p in prompts.train if p.dispreferred}
    longest = max((len(p.token_ids) + over.get(p.id, 0) for p in (*prompts.train, *prompts.eval)), default=0)
    return PromptFacts(len(prompts.train), len(prompts.eval), longest, read=True)


def _tokenizer(recipe: Recipe) -> Any:
    if recipe.policy.from_scratch is not None:
        from align.training.scratch import build_tokenizer

        return build_tokenizer(recipe.policy.from_scratch)
    from transformers import AutoTokenizer

    model = recipe.policy.model
    assert model is not None
    try:
        return AutoTokenizer.from_pretrained(model, revision=recipe.policy.revision)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"policy.model: {model} has no tokenizer that transformers can read: {first_line}") from None


def find_problems(plan: Plan) -> list[str]:
    """Every reason why the plan cannot be carried out, each with the part that is too large and what to turn."""
    problems = []
    machine = plan.machine
    on_device = [p for p in plan.memory if p.place == "device" or machine.kind == "cpu"]
    on_host = [p for p in plan.memory if p not in on_device]
    own = f"a rank has on this machine ({machine.name})"
    budgets = [
        ("memory", plan.device_bytes(), machine.device_bytes, own, on_device),
        ("main memory", plan.host_bytes(), machine.host_bytes, "that each rank has here", on_host),
        ("memory of the cold start", plan.cold_start_bytes(), machine.device_bytes, own, plan.cold_start),
    ]
    for what, need, have, whose, parts in budgets:
        if need > have:
            problems.append(_too_large(what, need, have, whose, parts))
    if plan.disk_free is not None and plan.disk_bytes() > plan.disk_free:
        problems.append(_too_large("disk", plan.disk_bytes(), plan.disk_free, "free under output_dir", plan.disk))
    return problems


def _too_large(what: str, need: int, have: int, whose: str, parts: Sequence[Part | Store]) -> str:
    """One message: what is needed, what there is, the largest part and its knob, and the other parts."""
    first, *others = sorted(parts, key=lambda part: (not part.knob, -part.bytes))  # one that can be made smaller
    rest = ", ".join(f"{part.name} {gib(part.bytes)}" for part in others if part.bytes * 50 > need)
    return (
        f"{what}: the run needs {gib(need)}, more than the {gib(have)} {whose}. Largest part with a knob: "
        f"{first.name}, {gib(first.bytes)} ({first.formula}); to make it smaller: {first.knob}."
        + (f" Then: {rest}." if rest else "")
    )


def find_notes(recipe: Recipe, plan: Plan) -> tuple[str, ...]:
    """What the user should know although nothing is refused."""
    notes = []
    machine, facts = plan.machine, plan.prompts
    need = max(plan.device_bytes(), plan.cold_start_bytes())
    if need > machine.device_free:
        notes.append(f"only {gib(machine.device_free)} of the device is free now; {gib(need)} are needed")
    if machine.devices and plan.ranks > machine.devices:
        notes.append(f"{plan.ranks} ranks need {math.ceil(plan.ranks / machine.devices)} machines like this one")
    if not facts.read:
        notes.append(f"the prompts lie on the hub and were not read; {facts.longest} tokens a prompt are assumed")
    elif facts.train:
        times = recipe.rounds.count * recipe.rounds.prompts_per_round / facts.train
        notes.append(f"{facts.train:,} training prompts are used {times:.2f} times over; {facts.eval:,} are held out")
    if questions := plan.total("questions"):
        judge, rounds = recipe.training.reward.judge, recipe.rounds.count
        notes.append(
            f"{judge} is asked {questions // rounds:,} questions about two responses a round, {questions:,} in all"
        )
    return tuple(notes)


def gib(size: int) -> str:
    """Bytes as GiB, or MiB below one GiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def render(plan: Plan) -> str:
    """The plan as plain text."""
    policy, machine = plan.policy, plan.machine
    lines = [
        f"Plan of {plan.recipe}: {policy.parameters:,} parameters ({policy.trainable:,} trained), "
        f"context {plan.context:,}, {plan.ranks} rank{'s' if plan.ranks > 1 else ''} on {machine.name}",
        "",
        "Stages (upper bounds, one turn each)",
    ]
    rows = [(s.name, f"x{s.times}", ", ".join(f"{n:,} {what}" for what, n in s.counts.items())) for s in plan.stages]
    lines += _columns(rows)
    totals = ", ".join(f"{plan.total(name):,} {name}" for name in ("tokens sampled", "tokens trained", "steps"))
    lines += [f"  in all: {totals}"]
    if plan.cold_start:
        lines += ["", f"Memory of one rank in the cold start ({gib(machine.device_bytes)} on the device)"]
        lines += _columns([(p.name, gib(p.bytes), p.formula) for p in plan.cold_start])
        lines += [f"  in all: {gib(plan.cold_start_bytes())}"]
    lines += ["", f"Memory of one rank in the rounds ({gib(machine.device_bytes)} on the device)"]
    mark = "" if machine.kind == "cpu" else " on the host"
    lines += _columns([(p.name + (mark if p.place == "host" else ""), gib(p.bytes), p.formula) for p in plan.memory])
    host = f", host {gib(plan.host_bytes())}" if plan.host_bytes() else ""
    lines += [f"  in all: {gib(plan.device_bytes())}{host}"]
    free = "" if plan.disk_free is None else f" ({gib(plan.disk_free)} free)"
    lines += ["", f"Disk under output_dir{free}"]
    lines += _columns([(s.name, gib(s.bytes), s.formula) for s in plan.disk])
    lines.append(f"  in all: {gib(plan.disk_bytes())}")
    if plan.notes:
        lines += ["", *(f"Note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    """Three columns: name, a right-aligned figure, the rest."""
    if not rows:
        return []
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {a:<{first}}  {b:>{second}}  {c}".rstrip() for a, b, c in rows]
