"""The command line: verbs only.  What a verb does stands in `align.loop` and the modules that it names.

Heavy imports live inside the verbs, so that `align --help` and a mistaken recipe answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from align.errors import AlignError

app = typer.Typer(
    name="align",
    help="Align a language model with imperfect supervision: sample, verify, combine, pair, train, export.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as training.learning_rate=1e-5."),
]
RankCount = Annotated[int | None, typer.Option("--ranks", help="Processes to start on this machine. Default: 1.")]
GpuMemory = Annotated[
    float | None,
    typer.Option("--gpu-gib", min=1, help="Plan for one GPU of this memory per rank, not for this machine."),
]
HostMemory = Annotated[float, typer.Option("--host-gib", min=1, help="With --gpu-gib: the machine's main memory.")]
Round = Annotated[int | None, typer.Option("--round", help="Which round, from 0. Default: the one the run stands at.")]


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None, ranks: RankCount = None) -> None:
    """Run the whole recipe, or go on with it where it stopped."""
    _launch("run", recipe, overrides, None, ranks)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    ranks: RankCount = None,
    gpu_gib: GpuMemory = None,
    host_gib: HostMemory = 1024.0,
    rates: Annotated[
        str | None, typer.Option("--rates", help="report.json of `align verify`: when would sampling again pay?")
    ] = None,
) -> None:
    """Print stages, steps, memory and disk without loading a model; refuse what cannot fit."""
    from pathlib import Path

    from align.launcher import apply_environment, check_rank_count, rank_environment
    from align.progress import clean
    from align.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    count = 1 if ranks is None else ranks
    check_rank_count(count)
    apply_environment(rank_environment(count))
    from align.machine import imagined
    from align.plan import make_plan, render

    machine = None if gpu_gib is None else imagined(count, gpu_gib, host_gib)
    from align.verifying.rates import resampling_lines

    known = resampling_lines(loaded, None if rates is None else Path(rates))
    print(clean("\n".join([render(make_plan(loaded, count, machine=machine)), *(["", *known] if known else [])])))


@app.command()
def sample(recipe: RecipeFile, overrides: Overrides = None, round: Round = None, ranks: RankCount = None) -> None:
    """Draw one round's responses from the policy."""
    _launch("sample", recipe, overrides, round, ranks)


@app.command()
def score(recipe: RecipeFile, overrides: Overrides = None, round: Round = None, ranks: RankCount = None) -> None:
    """Let the verifiers judge a round's responses, and combine their verdicts."""
    _launch("score", recipe, overrides, round, ranks)


@app.command()
def pair(recipe: RecipeFile, overrides: Overrides = None, round: Round = None, ranks: RankCount = None) -> None:
    """Turn a round's scores into preference pairs."""
    _launch("pair", recipe, overrides, round, ranks)


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, round: Round = None, ranks: RankCount = None) -> None:
    """Train the policy on a round's pairs."""
    _launch("train", recipe, overrides, round, ranks)


@app.command()
def evaluate(recipe: RecipeFile, overrides: Overrides = None, round: Round = None, ranks: RankCount = None) -> None:
    """Measure the policy on held-out prompts."""
    _launch("evaluate", recipe, overrides, round, ranks)


@app.command()
def export(recipe: RecipeFile, overrides: Overrides = None, ranks: RankCount = None) -> None:
    """Write the policy as a Hugging Face checkpoint, reload it and compare."""
    _launch("export", recipe, overrides, None, ranks)


@app.command()
def verify(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="The recipe with the verifiers.")] = None,
    responses: Annotated[
        str | None, typer.Argument(metavar="[RESPONSES]", help="Responses to score: JSONL, CSV or Parquet.")
    ] = None,
    overrides: Overrides = None,
    *,
    votes: Annotated[str | None, typer.Option("--votes", help="Instead: a CSV of votes, may be gzipped.")] = None,
    labels: Annotated[int | None, typer.Option("--labels", help="Let the ensemble see gold of so many items.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Directory for the result; new, or an earlier one.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="With --votes: the plot and the table too.")] = False,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="A column of RESPONSES, such as prompt=question."),
    ] = None,
) -> None:
    """Score a file of responses with the recipe's verifiers, or a file of votes; say how far to trust it."""
    from align.progress import clean
    from align.verifying.arguments import verify as verify_file

    lines = verify_file(recipe, responses, overrides or (), votes, labels, out=out, plot=plot, columns=columns or ())
    print(clean("\n".join(lines)))


@app.command()
def distil(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    base: Annotated[
        str | None, typer.Option("--base", help="The model to start from; by default the run's export.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Keep only its first layers.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the scored responses, at most.")] = 10,
    patience: Annotated[int, typer.Option("--patience", min=1, help="Epochs without gain that end it.")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Responses in one step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0, help="Peak learning rate.")] = 1e-4,
    pair_weight: Annotated[
        float, typer.Option("--pair-weight", min=0.0, help="Weight of comparisons within a prompt.")
    ] = 1.0,
) -> None:
    """Teach what the run's ensemble says to one small reward model, and say how much of it was kept."""
    from align.progress import clean
    from align.recipe_file import load_recipe
    from reward_models.distil import run_distil
    from reward_models.scorer import Fitting

    loaded = load_recipe(recipe, overrides or ())
    settings = Fitting(epochs, batch_size, learning_rate, pair_weight, patience, seed=loaded.seed)
    print(clean("\n".join(run_distil(loaded, base, layers, settings))))


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing, and what to do about it."""
    from align.doctor import examine

    raise typer.Exit(examine())


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema."""
    import json

    from align.recipe_file import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


def _launch(verb: str, recipe: str, overrides: list[str] | None, round_index: int | None, ranks: int | None) -> None:
    from align.launcher import launch
    from align.recipe_file import load_recipe

    raise typer.Exit(launch(load_recipe(recipe, overrides or ()), verb, round_index, ranks))


def main() -> None:
    """Entry point.  Exit status: 0 done, 1 the run failed, 2 the input is wrong, 130 or 143 stopped by a signal."""
    for caught in (signal.SIGINT, signal.SIGTERM):
        signal.signal(caught, _stop)
    try:
        app()
    except AlignError as error:
        from align.progress import clean, is_speaker

        prefix = "" if is_speaker() else f"rank {os.environ['RANK']}: "
        print(f"{prefix}{clean(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _stop(number: int, _frame: FrameType | None) -> None:
    """Ends the process at once.  Whatever is committed is safe, and the rest is done again by the next `align run`;
    unwinding through engines and collectives could only hang."""
    from align.launcher import stopped_by

    print(stopped_by(number), file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
