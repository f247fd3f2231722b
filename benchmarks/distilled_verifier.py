"""One small classifier for a whole ensemble: what it keeps of the ensemble's selection accuracy, and at what time.

    python benchmarks/distilled_verifier.py runs/arithmetic_ensemble/ensemble-0

The run is a finished one of `arithmetic_ensemble.py`; nothing in it is changed.  The student is the run's starting
model cut to `--layers` layers, taught P(good) of all responses on four fifths of the prompts.  On the others it picks
one of eight, and so does the ensemble; gold says who was right.

The ensemble's cost is stated, not measured: its verifiers here are rules that take microseconds, which stand for
models.  It is taken as ten reward models of the policy's own size, ten times the measured time of one, scored by the
same code in the same batches as the student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.distributed import Ranks
from align.recipe_file import load_recipe
from align.run import Run
from benchmarks.common import Row, print_report
from reward_models.distil import read_examples, split, teach, told
from reward_models.scorer import Fitting, encode, make_scorer, score

ENSEMBLE_MODELS = 10
REPEATS = 3


def seconds_per_1000(base: Path, layers: int | None, texts: list[str]) -> float:
    """Median time to score 1000 of these responses with a classifier of this shape."""
    model, tokenizer = make_scorer(base, layers)
    found = []
    for _ in range(REPEATS):
        began = time.monotonic()
        score(model, encode(tokenizer, texts))
        found.append(1000.0 * (time.monotonic() - began) / len(texts))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    asked = parser.parse_args()
    directory: Path = asked.run.resolve()
    recipe = load_recipe(directory / "recipe.yaml", [f"output_dir={directory.parent}"])
    with Run.open(recipe, Ranks(), allow_new=False) as run:
        examples, rules_s = read_examples(run)
        base = run.model_dir()
    settings = Fitting(asked.epochs, 64, asked.learning_rate)
    report = teach(examples, base, settings, asked.layers)[2] | {"ensemble_seconds_per_1000": None}
    print("\n".join(told(report)))
    texts = [e.text for e in split(examples)[1]]
    student_s = seconds_per_1000(base, asked.layers, texts)
    ensemble_s = ENSEMBLE_MODELS * seconds_per_1000(base, None, texts)
    chosen = report["selection"]
    print(f"the run's rules took {rules_s} s for 1000 responses; stated cost of the ensemble {ensemble_s:.3f} s")
    print(json.dumps(report))
    print_report("distilled_verifier", [
        Row("selection accuracy", chosen["student"], chosen["ensemble"], chosen["retained"], "of held-out prompts"),
        Row("time", student_s, ensemble_s, student_s / ensemble_s, "s per 1000 responses"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
