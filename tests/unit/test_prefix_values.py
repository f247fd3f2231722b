"""The pair stage of the step builders on a real store and real verifiers; a script writes what a policy would draw."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.pairs import pairs_per_prompt
from align.recipe import Recipe
from align.records import Pair, Prompt, Sample, Verdict, content_id
from align.run import Run
from align.stages import PAIR_STAGES, pair, sample, score
from align.store import RunStore
from align.tasks.arithmetic import solution
from align.verifiers.base import Item, judge
from align.verifiers.registry import build
from align.workload import _rollouts

ROOM = 30
NINES = {"kind": "arithmetic", "name": "nines", "check": "nines"}
CORRECT = {"kind": "answer", "name": "correct"}
STEPS: dict[str, Any] = {"separator": ",", "rollouts": 3, "best_of": 2, "prompts_per_shard": 4, "judge": "correct"}


BOTH = (NINES, CORRECT)


def recipe(folder: Path, builder: str = "per_step", verifiers: Sequence[dict] = BOTH, **steps: Any) -> Recipe:
    if builder in ("partial", "tree"):
        kept = ("separator", "judge") if builder == "partial" else ("separator", "judge", "prompts_per_shard")
        steps = {k: STEPS[k] for k in kept} | steps
    else:
        steps = STEPS | steps
    shape = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 1, "kv_heads": 1, "context": 64}
    return Recipe.model_validate(
        {
            "name": "steps",
            "output_dir": str(folder),
            "policy": {"from_scratch": shape, "dtype": "float32"},
            "cold_start": {"steps": 1},
            "prompts": {"arithmetic": {"digits": 2, "count": 30, "solution": "columns"}},
            "sampling": {"samples_per_prompt": 6, "max_new_tokens": ROOM, "prompts_per_shard": 5},
            "verifiers": list(verifiers),
            "pairs": {"builder": builder, "steps": {k: v for k, v in steps.items() if v is not None}},
            "rounds": {"count": 1, "prompts_per_round": 10},
        }
    )


class Script:
    """A sampler whose policy solves the problem right with probability 0.6, unless it has gone wrong already."""

    def __init__(self, encode: Callable[[str], list[int]], end: int, fail_after: int | None = None) -> None:
        self.encode, self.end, self.fail_after = encode, end, fail_after
        self.asked: list[tuple[str, int]] = []

    def sample(self, prompts: Sequence[Prompt], *, n: int, purpose: str, used: Sequence[int] | None = None,
               **how: Any) -> list[Sample]:  # fmt: skip
        if purpose == "rollout":
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise RuntimeError("the machine went away")
            self.asked.append((prompts[0].id, len(prompts)))
        rows = []
        for prompt, begun in zip(prompts, used or [0] * len(prompts), strict=True):
            question, written = prompt.text[: len(prompt.text) - begun], prompt.text[len(prompt.text) - begun :]
            for index in range(n):
                rng = random.Random(content_id(purpose, prompt.id, index))
                right = solution(question, "columns", False, rng)
                lost = not right.startswith(written)
                text = right if rng.random() < 0.6 and not lost else solution(question, "columns", True, rng)
                ids = (*self.encode(text[begun:]), self.end)[: ROOM - begun]
                rows.append(Sample(
                    content_id(prompt.id, how["policy_version"], rng.random(), index), prompt.id, index, 0, 0,
                    prompt.token_ids, ids, (-0.5,) * len(ids), text[begun:], "stop", how["temperature"], 1.0, 0,
                    ROOM - begun,
                ))  # fmt: skip
        return rows


class Scripted(Run):
    """A run without engines."""

    script: Script

    def model_dir(self) -> Path:
        return self._base_dir()

    def synced_sampler(self) -> Any:
        return self.script

    def verifier_pool(self, *, gold: bool) -> Any:
        return Here(self.recipe.verifiers, 0)


class Here:
    """The recipe's verifiers in this process: a process of their own takes longer to start than a round here."""

    def __init__(self, specs: Sequence[Any], seed: int) -> None:
        self.verifiers = [build(spec) for spec in specs]

    def verify(self, items: Sequence[Item], stage: str | None = None) -> list[Verdict]:
        said = {v.name: judge(v, items) for v in self.verifiers}
        return [
            Verdict(item.sample_id, name, *((None, of[i]) if isinstance(of[i], str) else (of[i], None)))
            for i, item in enumerate(items)
            for name, of in said.items()
        ]

    def costs(self) -> dict[str, dict[str, float]]:
        """Nothing is counted."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scripted]]:
    """Opens a run, closing the one before; the same recipe continues it."""
    from transformers import AutoTokenizer

    monkeypatch.setattr("align.rollout_judge.VerifierPool", Here)
    opened: list[Scripted] = []

    def start(made: Recipe, fail_after: int | None = None) -> Scripted:
        for run in opened:
            run.close(None)
        opened.clear()
        run = Scripted(made, Ranks(), RunStore.open(made, Ranks(), identity={}))
        opened.append(run)
        tokenizer = AutoTokenizer.from_pretrained(run._base_dir())
        run.script = Script(lambda text: tokenizer(text)["input_ids"], tokenizer.eos_token_id, fail_after)
        return run

    yield start
    for run in opened:
        run.close(None)


def through(run: Scripted, *stages: Callable) -> Scripted:
    for stage in stages or (sample, score, pair):
        stage(run, 0)
    return run


def rows(run: Run, stage: str) -> list:
    return run.store.read(0, stage)


def sides(run: Run) -> list[tuple[Pair, Sample, Sample]]:
    """Every pair with its samples, as the trainer finds them."""
    stages = ("samples", *PAIR_STAGES[run.recipe.pairs.builder].makes)
    everything = {s.id: s for stage in stages for s in rows(run, stage)}
    return [(p, everything[p.chosen_id], everything[p.rejected_id]) for p in rows(run, "pairs")]


def test_plain_pairs_from_end_to_end(start: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = through(start(recipe(tmp_path)))
    found = sides(run)
    assert len(found) > 3
    for made, chosen, rejected in found:
        question = run.prompts().train[[p.id for p in run.prompts().train].index(made.prompt_id)]
        right = solution(question.text, "columns", False, random.Random(0))
        assert chosen.text == right and chosen.response_ids[-1] == run.script.end
        assert rejected.prompt_ids == chosen.prompt_ids == question.token_ids
        assert rejected.text.endswith(",") or rejected.response_ids[-1] == run.script.end
        assert not right.startswith(rejected.text)  # the pit is in it
        drawn = {s.id: s for s in rows(run, "samples")}
        assert any(s.response_ids[: len(rejected.response_ids)] == rejected.response_ids for s in drawn.values())
    said = capsys.readouterr().out
    assert "continuations and" in said and "pairs.steps.max_tokens: 20,000,000" in said
    assert said.index("continuations and") < said.index("pairs from 60 responses to 10 prompts")
    told = run.kept(0, "pairing")["counts"]
    assert told["pairs"] == told["candidates"] == len(found)


def test_the_pit_is_the_first_column_that_goes_wrong(start: Callable, tmp_path: Path) -> None:
    """With enough rollouts, everything before the last step of a rejected response is right."""
    run = through(start(recipe(tmp_path, rollouts=8, best_of=4)))
    for made, chosen, rejected in sides(run):
        body, _, last = rejected.text.rstrip(",").rpartition(",")
        assert chosen.text.startswith(body) and last, made


def test_shared_prefixes(start: Callable, tmp_path: Path) -> None:
    for against in ("continuation", "step"):
        run = through(start(recipe(tmp_path / against, shared_prefix=True, against=against)))
        found = sides(run)
        assert len(found) > 3
        for made, chosen, rejected in found:
            assert chosen.prompt_ids == rejected.prompt_ids and chosen.response_ids != rejected.response_ids
            assert made.prompt_id == chosen.prompt_id == rejected.prompt_id
            assert rejected.text.count(",") <= 1 and (against == "continuation" or chosen.text.count(",") <= 1)
            assert against == "step" or chosen.response_ids[-1] == run.script.end


def artifacts(run: Run, *stages: str) -> dict[str, bytes]:
    folder = run.store.root / "rounds" / "00000"
    return {f.name: f.read_bytes() for stage in stages for f in sorted(folder.glob(f"{stage}-*.parquet"))}


MADE = ("rollouts", "prefix_values", "step_samples", "pairs")


@pytest.mark.parametrize("builder", ["per_step", "tree"])
def test_a_run_that_breaks_off_ends_with_the_same_bytes(start: Callable, tmp_path: Path, builder: str) -> None:
    whole = artifacts(through(start(recipe(tmp_path / "whole", builder))), *MADE)
    made = recipe(tmp_path / "broken", builder)
    broken = start(made, fail_after=2)
    with pytest.raises(RuntimeError, match="went away"):
        through(broken)
    asked = len(through(start(made)).script.asked)
    again = start(made)
    assert artifacts(again, *MADE) == whole and len(whole) >= 6
    through(again)
    assert again.script.asked == [] and asked > 0


def test_a_kill_between_values_and_pairs_draws_nothing_again(start: Callable, tmp_path: Path) -> None:
    whole = artifacts(through(start(recipe(tmp_path / "whole"))), *MADE)
    made = recipe(tmp_path / "broken")
    first = through(start(made), sample, score)
    PAIR_STAGES["per_step"].prepare(first, 0)
    second = start(made)
    report, parts = PAIR_STAGES["per_step"].build(second, 0)
    second.store.commit_shard(0, "step_samples", 0, parts)  # and killed here
    assert report.pairs
    through(start(made), pair)
    assert artifacts(start(made), *MADE) == whole


def test_shards_do_not_change_the_values(start: Callable, tmp_path: Path) -> None:
    """With one judge, what a prompt's rollouts are worth does not depend on the prompts beside it."""
    found = []
    for size in (1, 4, 100):
        run = through(start(recipe(tmp_path / str(size), prompts_per_shard=size)))
        found.append((rows(run, "prefix_values"), rows(run, "pairs")))
    by_id = [({v.id: v for v in values}, pairs) for values, pairs in found]
    assert by_id[0] == by_id[1] == by_id[2]


def test_the_ensemble_judges_rollouts_beside_the_rounds_own_verdicts(start: Callable, tmp_path: Path) -> None:
    run = through(start(recipe(tmp_path, judge=None)))
    assert len(rows(run, "pairs")) > 3
    assert {v.value for v in rows(run, "prefix_values")} & {1.0} and all(0 < p.weight <= 1 for p in rows(run, "pairs"))


def test_partly_correct_pairs(start: Callable, tmp_path: Path) -> None:
    run = through(start(recipe(tmp_path, "partial", state=":([0-9])(c[0-9])?")))
    found = sides(run)
    assert len(found) > 3 and not (run.store.root / "rounds/00000/rollouts-00000.parquet").exists()
    for made, chosen, rejected in found:
        assert chosen.prompt_ids == rejected.prompt_ids and made.margin > 0
        assert chosen.response_ids[-1] == run.script.end or chosen.text.endswith(",")


def test_tree_pairs(start: Callable, tmp_path: Path) -> None:
    run = through(start(recipe(tmp_path, "tree", tree={"actions": 4, "iterations": 3})))
    found = sides(run)
    assert len(found) > 3
    values = {v.sample_id: v for v in rows(run, "prefix_values")}
    for made, chosen, rejected in found:
        assert chosen.prompt_ids == rejected.prompt_ids
        assert values[chosen.id].value - values[rejected.id].value >= 0.1 and made.margin == pytest.approx(
            values[chosen.id].value - values[rejected.id].value
        )
        assert chosen.text.count(",") <= 1 and rejected.text.count(",") <= 1
    assert {v.step for v in values.values()} == {1, 2, 3} or {v.step for v in values.values()} == {1, 2}


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "steps", "message"),
    [
        ("per_step", {"separator": "\n"}, r"pairs.steps.separator: '\\n' finds no step inside any of the \d+ resp"),
        ("per_step", {"rule": "tokens", "separator": None, "tokens_per_step": 30}, "pairs.steps.tokens_per_step: 30"),
        ("partial", {"separator": ";"}, "pairs.steps.separator: ';'"),
        ("tree", {"separator": ";", "tree": {"iterations": 3}}, "pairs.steps.separator: ';'"),
        ("per_step", {"max_tokens": 100}, "at most .* continuations and .* tokens, over pairs.steps.max_tokens: 100"),
    ],
)
def test_a_round_that_cannot_be_cut_or_costs_too_much_stops(
    start: Callable, tmp_path: Path, builder: str, steps: dict, message: str
) -> None:
    run = through(start(recipe(tmp_path, builder, **steps)), sample, score)
    with pytest.raises(RunError, match=message):
        pair(run, 0)
    assert builder == "tree" or run.script.asked == []


class Silent(Here):
    """Has nothing to say of what a rollout completed."""

    def verify(self, items: Sequence[Item], stage: str | None = None) -> list[Verdict]:
        return [Verdict(item.sample_id, "correct", None, "the text is strange") for item in items]


def test_a_verifier_that_abstains_on_prefixes_is_named(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be said of any prefix: no pair, and the verifier's name and reason."""
    begun = start(recipe(tmp_path))
    monkeypatch.setattr("align.rollout_judge.VerifierPool", Silent)
    run = through(begun)
    told = run.kept(0, "pairing")
    assert rows(run, "pairs") == [] and told["counts"]["unjudged"] > 3 and "every verifier abstained" in told["explain"]
    assert all(v.rollouts == 0 for v in rows(run, "prefix_values"))
    assert "rollouts: correct gave no verdict on" in (said := capsys.readouterr().out) and "the text is strange" in said


def test_rollouts_need_the_weights_that_drew_the_samples(start: Callable, tmp_path: Path) -> None:
    run = through(start(recipe(tmp_path)), sample, score)
    run.store._latest = 1  # as after a round of training
    with pytest.raises(InputError, match="round 0 has no rollouts, and the policy stands at round 1"):
        pair(run, 0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"builder": "per_step", "steps": {"rollouts": 0}}, "greater than or equal to 1"),
        ({"builder": "per_step", "steps": {"state": "x"}}, "pairs.steps.state: per_step with rule separator does not"),
        ({"builder": "per_step", "steps": {"tokens_per_step": 3}}, "pairs.steps.tokens_per_step: .* does not read it"),
        ({"builder": "tree", "steps": {"rollouts": 3}}, "pairs.steps.rollouts: tree .* does not read it"),
        ({"builder": "partial", "steps": {"shared_prefix": True}}, "pairs.steps.shared_prefix: partial .* not read"),
        ({"builder": "per_step", "steps": {"against": "step"}}, "pairs.steps.against: needs shared_prefix"),
        ({"builder": "best_worst", "steps": {"rollouts": 3}}, "pairs.steps: best_worst does not look at steps"),
        ({"builder": "per_step", "steps": {"judge": "coin"}}, "'coin' is no binary verifier of this recipe; .*: nines"),
        ({"builder": "per_step", "steps": {"rule": "pattern"}}, "pattern: `rule: pattern` needs one"),
        ({"builder": "per_step", "steps": {"rule": "pattern", "pattern": "("}}, "is no regular expression"),
        ({"builder": "per_step", "steps": {"separator": ""}}, "at least 1 character"),
        ({"builder": "tree", "steps": {"tree": {"actions": 1}}}, "greater than or equal to 2"),
    ],
)
def test_settings_that_nobody_would_read_are_refused(pairs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({
            "name": "x", "policy": {"model": "m"}, "pairs": pairs,
            "verifiers": [NINES, {"kind": "self_consistency", "name": "coin"}],
        })  # fmt: skip


def test_the_artifacts_are_plain_tables(start: Callable, tmp_path: Path) -> None:
    run = through(start(recipe(tmp_path)))
    folder = run.store.root / "rounds/00000"
    table = pq.read_table(folder / "prefix_values-00000.parquet").to_pylist()
    assert set(table[0]) == {"id", "prompt_id", "sample_id", "step", "tokens", "rollouts", "value", "best"}
    assert all(row["rollouts"] == 3 and row["value"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
               for row in table)  # fmt: skip


def test_what_the_plan_says_of_the_rollouts(tmp_path: Path) -> None:
    """10 prompts x 2 wrong responses x 16 steps are 320 prefixes, each 3 x 2 times to 30 tokens at most."""
    drawn = 320 * 6
    (stage,) = _rollouts(recipe(tmp_path))
    assert stage.counts == {
        "prefixes": 320, "rollouts": drawn, "tokens sampled": drawn * 30, "opinions": drawn, "samples": 320,
    }  # fmt: skip
    (stage,) = _rollouts(recipe(tmp_path, "tree", judge=None))
    assert (stage.counts["prefixes"], stage.counts["rollouts"], stage.counts["opinions"]) == (50, 150, 300)
    assert _rollouts(recipe(tmp_path, "partial")) == []
    most = [pairs_per_prompt(recipe(tmp_path, builder)) for builder in ("per_step", "partial", "tree")]
    assert most == [2, 4, 5]
