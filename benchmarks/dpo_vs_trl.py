"""A DPO step of this project against TRL's `DPOTrainer`: same model, pairs, dtype, batch, optimizer, live reference.

    python benchmarks/dpo_vs_trl.py

Both sides train a Qwen3-shaped model (8 layers, width 256) in float32 on the same 8 pairs per step in the same order,
recompute the reference in every step and take a clipped AdamW step, without gradient checkpointing.  TRL takes text
only, so a word-level tokenizer makes its token counts exact.  Each side has a process of its own, so that neither
changes the other's surroundings; their blocks of steps alternate, and every step's losses must agree.

Cases are named `prompt tokens + response tokens`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Row, paired_ratio, peak_over, print_report, resident_bytes

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets; each side is one process alone, whatever started the benchmark."""
VOCABULARY, EOS = 4096, 1
PAIRS = 8  # per step
BETA, LEARNING_RATE, CLIP = 0.1, 1e-4, 1.0
CASES = ("256+64", "64+128")

Words = list[int]
PairOfWords = tuple[Words, Words, Words]  # prompt, chosen, rejected; responses end with EOS


def make_model(directory: Path, layers: int = 8, width: int = 256) -> None:
    """The model and the word-level tokenizer: word i is written `wi` and has token id i."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    vocabulary = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def make_pairs(steps: int, case: str) -> list[PairOfWords]:
    """Random words of exact length."""
    prompt_tokens, response_tokens = map(int, case.split("+"))
    rng = random.Random(0)

    def words(count: int) -> Words:
        return [rng.randrange(2, VOCABULARY) for _ in range(count)]

    def response() -> Words:
        return [*words(response_tokens - 1), EOS]

    return [(words(prompt_tokens), response(), response()) for _ in range(steps * PAIRS)]


def run_ours(model_dir: Path, pairs: list[PairOfWords], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """This project over the pairs in order, through the `train_round` that a run calls.

    A round here is one step, so its reference log-probabilities are computed live.
    """
    from align.distributed import Ranks
    from align.recipe import Recipe
    from align.records import Pair, Sample
    from align.training.engine import PolicyEngine
    from align.training.trainers import RoundData, train_round

    training = {
        "learning_rate": LEARNING_RATE, "pairs_per_step": PAIRS, "tokens_per_batch": 8192, "max_grad_norm": CLIP,
        "loss": {"beta": BETA},
    }  # fmt: skip
    policy = {"model": str(model_dir), "dtype": "float32"}
    verifiers = [{"kind": "repetition", "name": "unused"}]
    recipe = Recipe.model_validate(
        {"name": "benchmark", "policy": policy, "verifiers": verifiers, "training": training}
    )
    samples: dict[str, Sample] = {}
    for i, (prompt, *responses) in enumerate(pairs):
        for side, ids in zip(("c", "r"), responses, strict=True):
            samples[f"{i}{side}"] = Sample(
                id=f"{i}{side}", prompt_id=f"p{i}", index=0, policy_version=0, seed=0, prompt_ids=tuple(prompt),
                response_ids=tuple(ids), logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0,
                top_k=0, max_new_tokens=len(ids),
            )  # fmt: skip
    records = [Pair(f"{i}", f"p{i}", f"{i}c", f"{i}r", 1.0, 0.0, 1.0, 1.0, "benchmark") for i in range(len(pairs))]
    engine = PolicyEngine(model_dir, recipe, Ranks(), total_steps=steps)
    losses: list[float] = []
    after_step(0)
    for done in range(steps):
        batch = records[done * PAIRS : (done + 1) * PAIRS]
        train_round(engine, RoundData(done, samples, pairs=batch), recipe, lambda row: losses.append(row["loss"]))
        after_step(done + 1)
    return losses


def run_trl(model_dir: Path, pairs: list[PairOfWords], steps: int, after_step: Callable[[int], None]) -> list[float]:
    """TRL's trainer over the pairs in order; `after_step` is called between its steps.  Returns its losses."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    def text(ids: Words) -> str:
        return " ".join(f"w{i}" for i in ids)

    rows = [{"prompt": text(p), "chosen": " " + text(c[:-1]), "rejected": " " + text(r[:-1])} for p, c, r in pairs]
    losses: list[torch.Tensor] = []

    class Between(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after_step(state.global_step)

    class Plain(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Plain(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=DPOConfig(
                output_dir=scratch, per_device_train_batch_size=PAIRS, max_steps=steps, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=CLIP, weight_decay=0.0, beta=BETA,
                gradient_checkpointing=False, bf16=False, max_length=None, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[Between()],
        )  # fmt: skip
        _check_tokens(trainer, pairs)
        after_step(0)
        trainer.train()
    return [loss.item() for loss in losses]


def _check_tokens(trainer: Any, pairs: list[PairOfWords]) -> None:
    """TRL must see exactly the tokens that this project sees."""
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, pairs, strict=True):
        found = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        assert found == (prompt, chosen, rejected), "TRL tokenised the pairs differently"


def work(side: str, case: str, model_dir: Path, steps: int, block: int) -> None:
    """One side, in a process of its own: says `ready`, and runs `block` steps for every line it reads.

    Answers each line with seconds of wall and processor time, and at last with its losses and its peak memory over
    the process before any model was loaded.
    """
    import deepspeed  # noqa: F401  both sides import everything before the baseline: TRL uses it where it is installed
    import trl.trainer.dpo_trainer  # noqa: F401

    import align.training.preference  # noqa: F401

    pairs = make_pairs(steps, case)
    baseline = resident_bytes()
    started: tuple[float, float] | None = None

    def after_step(done: int) -> None:
        nonlocal started
        if done % block:
            return
        if started is not None:
            _say({"wall_s": time.perf_counter() - started[0], "cpu_s": time.process_time() - started[1]})
        if done < steps:
            if done == 0:
                _say({"ready": side})
            sys.stdin.readline()
            started = (time.perf_counter(), time.process_time())

    if side == "ours":
        losses = run_ours(model_dir, pairs, steps, after_step)
    else:
        losses = run_trl(model_dir, pairs, steps, after_step)
    _say({"losses": losses, "peak_mib": peak_over(baseline)})


def _say(message: dict[str, Any]) -> None:
    print("@" + json.dumps(message), flush=True)


class Worker:
    """The other end of `work`."""

    def __init__(self, side: str, case: str, model_dir: Path, steps: int, block: int) -> None:
        options = {"--side": side, "--case": case, "--model": model_dir, "--total": steps, "--steps": block}
        words = [str(word) for option in options.items() for word in option]
        alone = {k: v for k, v in os.environ.items() if k not in PLACE}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            env=alone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        error = self.process.communicate()[1]
        raise RuntimeError(f"the process ended early:\n{error[-4000:]}")

    def block(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.listen()

    def end(self) -> dict[str, Any]:
        """Its losses and peak memory; the process is over afterwards."""
        report = self.listen()
        self.process.communicate()
        return report


def compare(case: str, model_dir: Path, blocks: int, block: int) -> list[Row]:
    """Pairs per second and peak memory of both, their blocks alternating; the losses of every step must agree."""
    steps = (blocks + 1) * block
    ours, peer = (Worker(side, case, model_dir, steps, block) for side in ("ours", "trl"))
    times = [(ours.block(), peer.block()) for _ in range(blocks + 1)][1:]  # the first block warms up
    ours_end, peer_end = ours.end(), peer.end()
    worst = max(abs(a - b) for a, b in zip(ours_end["losses"], peer_end["losses"], strict=True))
    assert worst < 1e-4 and abs(ours_end["losses"][0] - peer_end["losses"][0]) < 1e-5, f"losses differ by {worst}"
    rows = []
    for clock, unit in (("wall_s", "pairs/s"), ("cpu_s", "pairs/s of processor time")):
        ours_s, peer_s = ([pair[i][clock] for pair in times] for i in (0, 1))
        name = case if clock == "wall_s" else f"{case} processor time"
        count = block * PAIRS * blocks
        rows.append(Row(name, count / sum(ours_s), count / sum(peer_s), paired_ratio(ours_s, peer_s), unit))
    ratio = peer_end["peak_mib"] / ours_end["peak_mib"]
    rows.append(Row(f"{case} peak memory", ours_end["peak_mib"], peer_end["peak_mib"], ratio, "MiB"))
    print(f"{case}: {steps} losses agree to {worst:.1e}", flush=True)
    for row in rows:
        print(f"  {row.case}: ours {row.ours:.2f}, TRL {row.peer:.2f} {row.unit}, {row.ratio:.2f} x better", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="alternating blocks per side and case")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps per block")
    parser.add_argument("--case", help="only this case, as `prompt tokens + response tokens`")
    for hidden in ("--side", "--model", "--total"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.side:
        work(arguments.side, arguments.case, Path(arguments.model), int(arguments.total), arguments.steps)
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory))
        for case in [arguments.case] if arguments.case else CASES:
            rows += compare(case, Path(directory), arguments.blocks, arguments.steps)
    print_report("dpo_vs_trl", rows)


if __name__ == "__main__":
    main()
