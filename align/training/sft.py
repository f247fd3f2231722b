"""The cold start: supervised fine-tuning through TRL's SFTTrainer, before the first round.

The rows are token ids made here (prompt, response, end-of-sequence), so TRL neither tokenises nor cuts anything; the
loss is the mean negative log-likelihood over response tokens, the end-of-sequence token included.  Row order is
fixed here too: an optimizer step sees the same rows with one rank and with several.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.progress import track
from align.prompts import PromptSet
from align.recipe import Recipe
from align.training.sft_data import Example, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

LAST_STEPS = 10
"""`loss_last` is the mean over this many final steps."""


class _Batching(NamedTuple):
    """How one optimizer step's rows are cut: micro-batches of `rows` on each rank, `accumulate` of them."""

    rows: int
    accumulate: int


def cold_start(
    model_dir: Path, recipe: Recipe, prompt_set: PromptSet, directory: Path, ranks: Ranks
) -> dict[str, float | int]:
    """Fine-tune the model in `model_dir` and write it to `directory` (rank 0), as fp32 safetensors.  Collective.

    All weights train, also where the recipe trains adapters later.  The result depends on model, recipe, prompts and
    number of ranks only; the caller's random state, environment and accelerate's globals are left as they were.
    Returns counts, tokens seen, seconds, and the loss (nats per response token) of the first step and of the last ten.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = recipe.cold_start
    assert settings is not None, "a cold start without a cold_start block"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples, counts = prepare(recipe, prompt_set, tokenizer, model_dir)
    order = _row_order(len(examples), settings.steps * settings.batch_size, recipe.seed)
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in examples)
    batching = _batching(settings.batch_size, ranks.world_size, longest, recipe.training.tokens_per_batch)
    began = time.monotonic()
    with _left_as_it_was(ranks):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
        losses = _train(model, tokenizer, recipe, examples, order, batching, directory)
        if ranks.rank == 0:
            model.save_pretrained(directory)
            AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    tail = losses[-LAST_STEPS:]
    return {
        **counts,
        "tokens": sum(len(examples[i].prompt_ids) + len(examples[i].response_ids) for i in order),
        "loss_first": losses[0],
        "loss_last": sum(tail) / len(tail),
        "seconds": time.monotonic() - began,
    }


def _row_order(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` row numbers: epoch after epoch, each in a seeded order of its own."""
    order: list[int] = []
    for epoch in itertools.count():
        if len(order) >= wanted:
            return order[:wanted]
        fresh = list(range(rows))
        random.Random(f"cold start:{seed}:{epoch}").shuffle(fresh)
        order += fresh
    raise AssertionError("unreachable")


def _batching(batch_size: int, world_size: int, longest: int, token_budget: int) -> _Batching:
    """The largest micro-batch that divides a rank's share of the batch and stays in the token budget when padded.

    A memory decision only: TRL divides by the response tokens of the whole optimizer step over all ranks.
    """
    if batch_size % world_size:
        raise InputError(
            f"cold_start.batch_size: {batch_size} does not divide by {world_size} ranks; use a multiple of {world_size}"
        )
    share = batch_size // world_size
    rows = max(r for r in range(1, share + 1) if share % r == 0 and (r == 1 or r * longest <= token_budget))
    return _Batching(rows, share // rows)


def _train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, examples: Sequence[Example],
    order: Sequence[int], batching: _Batching, directory: Path,
) -> list[float]:  # fmt: skip
    """Run TRL's trainer on the rows in the given order; returns the loss of every optimizer step."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    settings = recipe.cold_start
    assert settings is not None
    rows = Dataset.from_dict({
        "input_ids": [[*e.prompt_ids, *e.response_ids] for e in examples],
        "labels": [[-100] * len(e.prompt_ids) + list(e.response_ids) for e in examples],
    })  # fmt: skip
    losses: list[float] = []
    with track("cold start", total=settings.steps, unit="steps") as bar:
        trainer = SFTTrainer(
            model=model,
            args=_trl_settings(recipe, batching, directory),
            train_dataset=rows.select(order, keep_in_memory=True),
            processing_class=tokenizer,
            callbacks=[_watcher(losses, bar.advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.free_memory()
    return losses


def _trl_settings(recipe: Recipe, batching: _Batching, directory: Path) -> Any:
    """TRL's configuration: no evaluation, checkpoints, reports or workers, rows as they are and in their order."""
    import torch
    from trl import SFTConfig

    settings = recipe.cold_start
    assert settings is not None
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=batching.rows,
        gradient_accumulation_steps=batching.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        bf16=on_gpu and recipe.policy.dtype == "bfloat16",
        use_cpu=not on_gpu,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )


def _watcher(losses: list[float], advance: Callable[[], None]) -> TrainerCallback:
    """A callback that keeps each step's loss, stops at the first that is no number, and moves the progress bar."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise RunError(
                    f"cold start: the loss is {logs['loss']} at step {state.global_step}; "
                    f"lower cold_start.learning_rate or raise cold_start.warmup_steps"
                )
            losses.append(logs["loss"])
            advance()

    return Watcher()


@contextmanager
def _left_as_it_was(ranks: Ranks) -> Iterator[None]:
    """Undo what transformers and accelerate change for the whole process: random state, threads, environment, and
    the accelerator singletons, which would decide how DeepSpeed starts later.

    A single rank hides torchrun's variables, or accelerate would open a process group that nobody closes.
    """
    import numpy
    import torch
    from accelerate.state import AcceleratorState, GradientState

    environment, threads = dict(os.environ), torch.get_num_threads()
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    if ranks.world_size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate picks a number of its own
    try:
        with torch.random.fork_rng():
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
