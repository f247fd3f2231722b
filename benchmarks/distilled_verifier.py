"""One small classifier for a whole ensemble: what it keeps of the ensemble's selection accuracy, and at what time.

    python benchmarks/arithmetic_ensemble.py --only ensemble majority best_single    # makes the runs, three seeds
    python benchmarks/distilled_verifier.py runs/arithmetic_ensemble/ensemble-0

The ensemble is the run's eight rules and a panel of language models, each of which says how likely it finds a response
(`sequence_likelihood`).  The panel is what the first command left behind for other seeds: their cold starts, which add
rightly one time in three or six, and what each way to use the rules made of them; none belongs to the run that is
distilled.  P(good) is what `method: auto` makes of all of them together, without a label.

The student is the run's trained policy with one logit in place of its head, taught by `align distil`'s own code on the
responses to the training prompts.  On the evaluation prompts, which nothing here was trained on, it picks one of eight,
and so does the ensemble; gold says who was right.

Both times are measured, in turns so that a busy machine slows both alike: the panel as it judges, one engine after the
other, and the student as the `reward_model` verifier that it becomes.  The rules' microseconds are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.distributed import Ranks
from align.ensemble.combine import combine, to_scores
from align.ensemble.table import from_records
from align.launcher import apply_environment, loopback_environment, rank_environment
from align.recipe import Ensemble
from align.recipe_file import load_recipe
from align.records import Sample, Verdict
from align.run import Run
from align.verifiers import in_process
from align.verifiers.base import Abstain, Item
from align.verifiers.spec import RewardModelSpec, SequenceLikelihoodSpec
from benchmarks.common import Row, print_report
from reward_models.distil import Example, Material, default_base, examples_of, teach
from reward_models.scorer import Fitting, make_scorer, save

BLOCK = 1000  # responses timed at once
TURNS = 5


@dataclass
class Panel:
    """What the language models said, and at what time.

    Example: Panel(specs=[…], said={("1+2=", "3"): [-0.1, -0.4]}, seconds=[0.8, 0.8], student_s=0.5, share=[0.6, 0.6])
    """

    specs: list[SequenceLikelihoodSpec] = field(default_factory=list)
    said: dict[tuple[str, str], list[float | Abstain]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # for 1000 responses, by model
    student_s: list[float] = field(default_factory=list)  # beside each
    share: list[float] = field(default_factory=list)  # the student's seconds in those of a model, median of the turns


def panel_of(run_dir: Path, seed: int) -> list[Path]:
    """The cold starts and exports of other seeds in the folder of the run."""
    found = [*run_dir.parent.glob("start-*/cold_start"), *run_dir.parent.glob("*-*/export")]
    return sorted(path for path in found if path.parent.name.rpartition("-")[2] != str(seed))


def ask(panel: Panel, models: Sequence[Path], texts: Sequence[tuple[str, str]], base: Path, layers: int | None) -> None:
    """Let every model judge every (prompt, response), and time it beside a classifier of the student's shape."""
    items = [Item(str(i), prompt, prompt, said, None, 0, "stop") for i, (prompt, said) in enumerate(texts)]
    panel.said.update({text: [] for text in texts})
    with tempfile.TemporaryDirectory() as folder:
        save(*make_scorer(base, layers), Path(folder))
        shape = RewardModelSpec.model_validate({"kind": "reward_model", "name": "student", "model": folder})
        student = in_process.build(shape, "float32", Path)
        for number, path in enumerate(models):
            block = {"kind": "sequence_likelihood", "name": f"panel_{number}", "model": str(path)}
            panel.specs.append(SequenceLikelihoodSpec.model_validate(block))
            verifier = in_process.build(panel.specs[-1], "float32", Path)
            for text, value in zip(texts, verifier.verify(items), strict=True):
                panel.said[text].append(value)
            turns = [(_seconds(verifier, items[:BLOCK]), _seconds(student, items[:BLOCK])) for _ in range(TURNS)]
            panel.seconds.append(statistics.median(theirs for theirs, _ in turns))
            panel.student_s.append(statistics.median(ours for _, ours in turns))
            panel.share.append(statistics.median(ours / theirs for theirs, ours in turns))
            verifier.close()
            print(f"{path}: {panel.seconds[-1]:.2f} s for 1000 responses, the student {panel.student_s[-1]:.2f} s")
        student.close()


def _seconds(verifier: Any, items: Sequence[Item]) -> float:
    """For 1000 responses."""
    began = time.monotonic()
    verifier.verify(items)
    return 1000.0 * (time.monotonic() - began) / len(items)


def verdicts_of(panel: Panel, samples: Sequence[Sample], texts: dict[str, str]) -> list[Verdict]:
    """The panel's verdicts on these samples."""
    found = []
    for s in samples:
        for spec, value in zip(panel.specs, panel.said[texts[s.prompt_id], s.text], strict=True):
            silent = isinstance(value, Abstain)
            found.append(Verdict(s.id, spec.name, None if silent else value, str(value) if silent else None))
    return found


def material_of(run: Run, panel: Panel, texts: dict[str, str]) -> Material:
    """The run's responses with P(good) by its rules and the panel together; evaluation stands beside its round."""
    rounds, store = run.recipe.rounds.count, run.store
    train: list[Example] = []
    held_out: list[Example] = []
    for index in range(rounds + 1):
        asked = store.stage_done(index, "eval_verdicts")
        if index == rounds and not asked:
            break
        beside = min(index, rounds - 1)
        samples = [*store.read(beside, "samples"), *(store.read(index, "eval_samples") if asked else ())]
        verdicts = [*store.read(beside, "verdicts"), *(store.read(index, "eval_verdicts") if asked else ())]
        verdicts += verdicts_of(panel, samples, texts)
        combined = combine(from_records(samples, verdicts, (*run.recipe.verifiers, *panel.specs)), Ensemble())
        print(f"round {index}: {combined.why}")
        scores = {s.sample_id: s.p_good for s in to_scores(samples, combined, 1)[0]}
        if index < rounds:
            train += examples_of(run, index, "samples", "gold", texts, scores)
        if asked:
            held_out += examples_of(run, index, "eval_samples", "eval_gold", texts, scores)
    return Material(train, held_out, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--panel", nargs="*", type=Path, help="language models; by default those of other seeds")
    parser.add_argument("--layers", type=int, help="keep only the student's first layers")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pair-weight", type=float, default=1.0)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    asked = parser.parse_args()
    apply_environment({**rank_environment(1), **loopback_environment()})
    directory: Path = asked.run.resolve()
    recipe = load_recipe(directory / "recipe.yaml", [f"output_dir={directory.parent}"])
    models = asked.panel or panel_of(directory, recipe.seed)
    if not models:
        raise SystemExit(f"{directory.parent}: no language model of another seed; make them, or name some by --panel")
    panel = Panel()
    with Run.open(recipe, Ranks(), allow_new=False) as run:
        texts = {p.id: p.text for p in (*run.prompts().train, *run.prompts().eval)}
        base = default_base(run)
        stages = [(i, s) for i in range(recipe.rounds.count + 1) for s in ("samples", "eval_samples")]
        drawn = [s for i, stage in stages if run.store.stage_done(i, stage) for s in run.store.read(i, stage)]
        ask(panel, models, sorted({(texts[s.prompt_id], s.text) for s in drawn}), base, asked.layers)
        material = material_of(run, panel, texts)
    reports = []
    for seed in asked.seeds:
        settings = Fitting(asked.epochs, 64, asked.learning_rate, asked.pair_weight, seed=seed)
        reports.append(teach(material, base, settings, asked.layers)[2])
        print(json.dumps({"seed": seed, **reports[-1]}), flush=True)
    chosen = [report["selection"] for report in reports]
    retained = [c["retained"] for c in chosen]
    student_s, ensemble_s = statistics.median(panel.student_s), sum(panel.seconds)
    share = 1.0 / sum(1.0 / share for share in panel.share)
    print(f"retained {statistics.mean(retained):.3f} ({', '.join(f'{r:.3f}' for r in retained)}), time {share:.3f}")
    ours, peer = statistics.mean(c["student"] for c in chosen), chosen[0]["ensemble"]
    print_report("distilled_verifier", [
        Row("selection accuracy", ours, peer, ours / peer, "of held-out prompts"),
        Row("time", student_s, ensemble_s, 1.0 / share, "s per 1000 responses"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
