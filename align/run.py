"""One run on one rank: the recipe, the store, and the heavy parts, each made when it is first needed.

A resumed run that only has to export never starts a sampler, and one that only has to sample never computes a
reference.  What is known of time and tokens is kept here and written to summary.json after every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.faults import reach
from align.inputs import check_inputs
from align.labels import Labelled, read_labels
from align.model_files import check_model_dir, resolve_model
from align.progress import say
from align.prompts import PromptSet, load_prompts, round_prompts
from align.recipe import Recipe
from align.recipe_rl import greedy_per_prompt
from align.records import Prompt, Sample
from align.sampling.environment import context_length
from align.sampling.probes import PROBE_TOKENS, Probe, choose_probes
from align.store import RunStore
from align.summary import build_summary, render_evaluation, render_report
from align.training.control import Control, control_of, mask_id
from align.verifiers.cache import VerdictCache, open_cache
from align.verifiers.registry import IN_PROCESS
from align.verifiers.runner import VerifierPool
from align.verifiers.spec import VerifierSpec

if TYPE_CHECKING:
    from align.sampling.engine import Sampler
    from align.training.engine import PolicyEngine
    from align.verifiers.base import ModelVerifier


class Run:
    """Everything the stages share."""

    def __init__(self, recipe: Recipe, ranks: Ranks, store: RunStore) -> None:
        self.recipe, self.ranks, self.store = recipe, ranks, store
        self._seconds: dict[str, float] = {}
        self._clock: list[str] = []
        self._mark = time.monotonic()
        self._prompts: PromptSet | None = None
        self._control = Control()
        self._sampler: Sampler | None = None
        self._synced_version: int | None = None
        self._policy: PolicyEngine | None = None
        self._pools: dict[bool, VerifierPool] = {}
        self._model_verifiers: list[ModelVerifier] = []
        self._labelled = Labelled()
        self._verdict_cache: VerdictCache | None = None
        self._cache: dict[tuple[int, str], list] = {}
        previous = store.read_json(None, "summary") or {}
        self._seconds.update({k: v for k, v in previous.get("seconds", {}).items() if k != "total"})

    # ---- life ----------------------------------------------------------------------------------------------

    @classmethod
    @contextmanager
    def open(cls, recipe: Recipe, ranks: Ranks, *, allow_new: bool = True) -> Iterator[Run]:
        """Check what can be checked before anything heavy starts, open the run directory, and close all at the end."""
        remarks, identity = check_inputs(recipe)
        store = RunStore.open(recipe, ranks, identity=identity, allow_new=allow_new)
        run = cls(recipe, ranks, store)
        for line in (*remarks, *store.notices):
            run.say(line)
        try:
            yield run
        except BaseException as error:
            run.close(error)
            raise
        run.close(None)

    def close(self, error: BaseException | None) -> None:
        """Stop the engines and the verifier processes; a run that failed, not one that was asked wrongly, says so.

        After an error, what goes wrong here is told and left: the user must see the first error, not the last.
        """
        steps: list[Callable[[], object]] = [pool.close for pool in self._pools.values()]
        steps += [model.close for model in self._model_verifiers]
        steps += [self._verdict_cache.close] if self._verdict_cache is not None else []
        if self._policy is not None:
            steps.append(self._policy.close)
        if self._sampler is not None:
            steps.append(self._sampler.close)
        if error is not None and not isinstance(error, InputError):
            steps.insert(0, lambda: self.write_summary("done" if self.store.finished else "failed"))
        try:
            for step in steps:
                try:
                    step()
                except Exception as second:
                    if error is None:
                        raise
                    self.say(f"while stopping: {second}")
        finally:
            self.store.close()

    def plan(self) -> None:
        """Work out what the run will take and keep it as plan.json; refuses what cannot fit, before anything loads."""
        from align.plan import make_plan

        prompts = self.prompts()
        with self.timed("plan"), self.ranks.stage("plan"):
            if self.ranks.rank == 0 and self.store.read_json(None, "plan") is None:
                plan = make_plan(self.recipe, self.ranks.world_size, prompts=prompts)
                self.store.commit_json(None, "plan", plan.to_json())
                for note in plan.notes:
                    self.say(f"plan: {note}")

    # ---- the parts -----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Rounds of training behind the policy: the number of the newest verified checkpoint."""
        return self.store.latest_checkpoint() or 0

    @property
    def stopped(self) -> str:
        """Why a rule of the trainer ended training for good: a committed report says it, so a resumed run knows too."""
        report = self.store.read_json(self.version - 1, "training") if self.version else None
        return "" if report is None else str(report["stopped"])

    @property
    def trained(self) -> bool:
        """Whether no round is left to train."""
        return self.version == self.recipe.rounds.count or bool(self.stopped)

    def model_dir(self) -> Path:
        """Directory of the policy before the first round, after the cold start where the recipe has one."""
        start = self._base_dir()
        if self.recipe.cold_start is None:
            return start
        done = self.store.verify_directory("cold_start")
        if done is not None:
            return done
        from align.training.sft import cold_start

        with self.timed("cold_start"):
            with self.store.commit_directory("cold_start") as directory:
                report = cold_start(start, self.recipe, self.prompts(), directory, self.ranks)
                self.keep(None, "cold_start_report", report)  # before the commit, so that no kill can part the two
        reach("loop.cold_start.after")
        committed = self.store.verify_directory("cold_start")
        assert committed is not None
        return committed

    def _base_dir(self) -> Path:
        """Directory of the model before any training: the recipe's, or the one made from scratch."""
        policy = self.recipe.policy
        return resolve_model(policy.model, policy.revision) if policy.model is not None else self._scratch_dir()

    def _scratch_dir(self) -> Path:
        """Directory of the untrained model that `policy.from_scratch` describes."""
        done = self.store.verify_directory("scratch")
        if done is None:
            from align.training.scratch import create_model

            assert self.recipe.policy.from_scratch is not None
            with self.store.commit_directory("scratch") as directory:
                if self.ranks.rank == 0:
                    create_model(directory, self.recipe.policy.from_scratch, self.recipe.seed)
            done = self.store.verify_directory("scratch")
        assert done is not None
        return done

    def prompts(self) -> PromptSet:
        """The prompts, rendered and split; refuses a source that changed since the run began."""
        if self._prompts is None:
            from transformers import AutoTokenizer

            path = self._base_dir()
            tokenizer, context = AutoTokenizer.from_pretrained(path), context_length(check_model_dir(path))
            self._control = control_of(self.recipe, tokenizer)
            mask_id(self.recipe, tokenizer)  # refused here rather than after a round of samples
            with self.timed("prompts"):  # a control text in front takes room that a prompt then has not
                room = None if context is None else context - self._control.longest
                found = load_prompts(self.recipe, tokenizer, room)
            self.store.pin("prompts", {"digest": found.digest, **found.report})
            self.say(f"prompts: {', '.join(f'{v} {k}' for k, v in found.report.items())}")
            self._labelled = read_labels(self.recipe, found, tokenizer)
            self._prompts = found
        return self._prompts

    def labelled(self) -> Labelled:
        """The responses of the recipe's label file, none where it names none."""
        self.prompts()
        return self._labelled

    def control(self) -> Control:
        """The texts that stand in front of the policy's prompts, where its loss has any."""
        self.prompts()
        return self._control

    def round_prompts(self, round_index: int) -> Sequence[Prompt]:
        """The training prompts of a round."""
        return round_prompts(self.prompts().train, round_index, self.recipe.rounds.prompts_per_round, self.recipe.seed)

    def eval_prompts(self) -> Sequence[Prompt]:
        """The held-out prompts that every evaluation uses, chosen by the seed."""
        held_out = self.prompts().eval
        return round_prompts(held_out, 0, min(self.recipe.evaluation.prompts, len(held_out)), self.recipe.seed)

    def policy(self) -> PolicyEngine:
        """The DeepSpeed engine, at the newest checkpoint.  Collective."""
        if self._policy is None:
            model_dir, version = self.model_dir(), self.version
            from align.training.engine import PolicyEngine

            with self.timed("start_trainer"):
                self._policy = PolicyEngine(model_dir, self.recipe, self.ranks, self.total_steps())
                if version:
                    checkpoint = self.store.verify_checkpoint(version)
                    self._policy.load(checkpoint)
                    self._policy.version = version
                    self.store.truncate_metrics(self._policy.step)
                else:
                    self.store.truncate_metrics(0)
        return self._policy

    def synced_sampler(self) -> Sampler:
        """The vLLM engine, holding exactly the trainer's weights, attested.  Collective."""
        policy = self.policy()
        if self._sampler is None:
            from align.sampling.engine import Sampler

            with self.timed("start_sampler"):
                self._sampler = Sampler(self.model_dir(), self.recipe, self.ranks)
        if self._synced_version != policy.version:
            from align.sampling.weights import sync

            with self.timed("sync"):
                report = sync(self._sampler, policy, self.probes(), self.recipe.sampling.attest_tolerance)
            self.keep(policy.version, "sync", report.to_dict())
            self._synced_version = policy.version
        return self._sampler

    def verifier_pool(self, *, gold: bool) -> VerifierPool:
        """The recipe's verifiers, or the gold one by itself, in their own processes."""
        if gold not in self._pools:
            chosen = (self.recipe.evaluation.gold,) if gold else self.recipe.verifiers
            specs = tuple(v for v in chosen if v is not None)
            in_process = {v.name: self._model_verifier(v) for v in specs if v.kind in IN_PROCESS}
            cache = self._verdict_cache
            if cache is None and self.recipe.verdict_cache:
                cache = open_cache(specs, self.store.root.parent, self.recipe.policy.dtype, self.model_dir, self.say)
            self._verdict_cache = cache
            self._pools[gold] = VerifierPool(specs, self.recipe.seed, in_process, cache)
        return self._pools[gold]

    def _model_verifier(self, spec: VerifierSpec) -> ModelVerifier:
        from align.verifiers import in_process

        with self.timed("start_reward_model"):
            self._model_verifiers.append(in_process.build(spec, self.recipe.policy.dtype, self.model_dir))
        return self._model_verifiers[-1]

    def probes(self) -> list[Probe]:
        """(prompt ids, response ids) on which trainer and sampler are compared."""
        policy, sampling = self.policy(), self.recipe.sampling
        context = context_length(check_model_dir(self.model_dir())) or PROBE_TOKENS
        if self.recipe.prompts.max_tokens is not None:
            context = min(context, self.recipe.prompts.max_tokens + sampling.max_new_tokens)
        most = sampling.engine.get("max_model_len") or context
        return choose_probes(self.prompts().train, policy.vocabulary_size, min(context, most))

    def total_steps(self) -> int:
        """Optimizer steps of the whole run at most: what the learning-rate schedule spans."""
        from align.training.trainers import steps_per_round

        return self.recipe.rounds.count * steps_per_round(self.recipe)

    # ---- what the stages ask for ---------------------------------------------------------------------------

    def require(self, round_index: int, stage: str, verb: str) -> None:
        """Refuse to go on without an artifact of this round."""
        if not self.store.stage_done(round_index, stage):
            raise InputError(f"round {round_index} has no {stage} yet; run `{verb}` first")

    def read(self, round_index: int, stage: str) -> list:
        """A committed stage's rows, verified; the newest two stay in memory."""
        key = (round_index, stage)
        if key not in self._cache:
            while len(self._cache) >= 2:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self.store.read(round_index, stage)
            if repeated := self.store.duplicates[key]:
                raise RunError(f"round {round_index}: {repeated} rows of {stage} are there twice: the run is not sound")
        return self._cache[key]

    def samples_per_shard(self, source: str) -> int:
        """Rows of one committed shard of samples."""
        sampling, evaluation = self.recipe.sampling, self.recipe.evaluation
        per_prompt = evaluation.samples_per_prompt
        if source == "samples":
            per_prompt = sampling.samples_per_prompt + greedy_per_prompt(self.recipe)
        return sampling.prompts_per_shard * per_prompt

    def gold_values(self, round_index: int, stage: str, samples: Sequence[Sample]) -> list[float | None] | None:
        """The gold verifier's value per sample, for reports only; None where the recipe names no gold verifier."""
        if self.recipe.evaluation.gold is None:
            return None
        values = {v.sample_id: v.value for v in self.read(round_index, stage)}
        return [values.get(s.id) for s in samples]

    def sequence_stats(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """Per sample: summed log(policy/reference) over the response in nats, and mean token entropy in nats.

        Split over the ranks and put together again, so every rank returns the whole.
        """
        policy, ranks, settings = self.policy(), self.ranks, self.recipe.evaluation
        mine = [i for i in range(len(samples)) if i % ranks.world_size == ranks.rank]
        sequences = [(samples[i].prompt_ids, samples[i].response_ids) for i in mine]
        now = policy.token_logprobs(sequences, entropy=True)
        bare = self.control().bare  # the initial policy knows no control text
        plain = [(bare(samples[i].prompt_ids, samples[i].policy_version), samples[i].response_ids) for i in mine]
        reference = policy.token_logprobs(plain, reference=True)
        assert now.entropies is not None
        rows = [
            (i, float((a - b).sum()), float(e.mean()) if len(e) else 0.0)
            for i, a, b, e in zip(mine, now.logprobs, reference.logprobs, now.entropies, strict=True)
        ]
        everything = sorted(row for part in ranks.gather(rows) for row in part)
        own = settings.temperature == 1.0 and settings.top_p == 1.0 and settings.top_k == 0
        kl = {"kl": [r[1] for r in everything]} if own else {}  # a mean over other samples than the policy's is no KL
        return {**kl, "entropy": [r[2] for r in everything]}

    # ---- what is told --------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Charge the time inside to `stage`; time in a nested block is charged to the inner one only."""
        self._charge()
        self._clock.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._clock.pop()

    def _charge(self) -> None:
        now = time.monotonic()
        stage = self._clock[-1] if self._clock else "other"
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._mark
        self._mark = now

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, written by rank 0; every rank calls it after every optimizer step."""
        self.store.append_metrics(dict(row))
        reach("training.step.after")

    def keep(self, round_index: int | None, name: str, value: Mapping[str, Any]) -> None:
        """Commit a small report once, rank 0 only; the summary is built from these, so a resumed run tells the same."""
        if self.ranks.rank == 0 and self.store.read_json(round_index, name) is None:
            self.store.commit_json(round_index, name, value)

    def kept(self, round_index: int | None, name: str) -> dict[str, Any]:
        """A report that an earlier stage kept."""
        found = self.store.read_json(round_index, name)
        assert found is not None, f"{name} is kept before it is asked for"
        return found

    def say(self, text: str) -> None:
        """A plain line from rank 0."""
        if self.ranks.rank == 0:
            say(text)

    def say_evaluation(self, version: int) -> None:
        """The evaluation of one version as one line."""
        self.say(f"round {version}: {render_evaluation(self.kept(version, 'evaluation'))}")

    def write_summary(self, status: str) -> None:
        """summary.json, from what is committed and what was counted."""
        self._charge()
        if self.ranks.rank == 0:
            self.store.write_summary(build_summary(self.recipe, self.store, status, self._seconds))

    def report(self) -> None:
        """The closing table and the learning curve, rank 0 only."""
        from align.curve import learning_curve

        if self.ranks.rank == 0:
            render_report(self.kept(None, "summary"), self.store.root)
            self.say(f"learning curve: {learning_curve(self.store.root)}")

    def model_card(self) -> str:
        """The export's README.md."""
        from align.model_card import model_card
        from align.preflight import settled

        summary = build_summary(self.recipe, self.store, "done", self._seconds)
        followed = settled(self.recipe, self.store.read_json(0, "preflight"))
        return model_card(followed, summary=summary, data=self.store.read_json(None, "prompts") or {})
