"""KTO and APO-zero for single responses against TRL 1.16's `KTOTrainer`, loss and gradient, on the same random batches.

    python tests/parity/kto_trl.py

TRL's side is its trainer's own `_compute_loss` on padded batches with mismatched completions; this project's is
`train_round` under DeepSpeed on packed groups in several micro-batches, stopped where the optimizer would step.
Prints a table and, as its last line, the rows as JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from align.distributed import Ranks
from align.recipe import Recipe
from align.records import Sample, Score
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round
from tests.parity.preference_trl import EOS, VOCABULARY, Gradient, make_models, relative

PROMPTS, RESPONSES = 5, 2
CASES: list[dict[str, Any]] = [
    {"name": "kto", "beta": 0.1},
    {"name": "kto", "beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.4},
    {"name": "apo_zero_unpaired", "beta": 0.1},
    {"name": "apo_zero_unpaired", "beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.4},
]


def make_data(seed: int) -> tuple[list[Sample], list[Score]]:
    """Prompts and responses of random length, two to a prompt, each good or bad."""
    rng = random.Random(seed)
    samples: list[Sample] = []
    scores: list[Score] = []
    for p in range(PROMPTS):
        prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 12)))
        for g in range(RESPONSES):
            response = tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, 17))) + (EOS,)
            samples.append(
                Sample(
                    id=f"{p}.{g}", prompt_id=f"{p}", index=g, policy_version=0, seed=0, prompt_ids=prompt,
                    response_ids=response, logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0,
                    top_k=0, max_new_tokens=20,
                )
            )  # fmt: skip
            good = float(rng.random() < 0.5)
            scores.append(Score(f"{p}.{g}", f"{p}", good, good, 0.0, 1))
    return samples, scores


class Ours:
    """`train_round`, with the gradient taken where the optimizer would step."""

    def __init__(self, reference: Path, policy: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = str(reference)
        self._engine = PolicyEngine(reference, self._recipe(CASES[0]), Ranks(), total_steps=1)
        self._engine.model.load_state_dict(AutoModelForCausalLM.from_pretrained(policy).state_dict())
        self._gradient: Gradient = {}
        self._engine.apply = self._take  # type: ignore[method-assign]

    def _recipe(self, loss: dict[str, Any]) -> Recipe:
        training = {
            "algorithm": "group", "loss": loss, "responses_per_step": 1000, "tokens_per_batch": 80,
            "logit_chunk_tokens": 16,
        }  # fmt: skip
        policy = {"model": self._model, "dtype": "float32"}
        verifiers = [{"kind": "repetition", "name": "filler"}]
        return Recipe.model_validate({"name": "p", "policy": policy, "verifiers": verifiers, "training": training})

    def _take(self) -> bool:
        named = dict(self._engine.model.named_parameters())
        self._gradient = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        return True

    def __call__(self, case: dict[str, Any], samples: list[Sample], scores: list[Score]) -> tuple[dict, Gradient]:
        rows: list[dict[str, Any]] = []
        data = RoundData(0, samples={s.id: s for s in samples}, scores=scores)
        train_round(self._engine, data, self._recipe(case), rows.append)
        return rows[0], self._gradient


class Theirs:
    """TRL's trainer, made once; a case sets its attributes."""

    def __init__(self, reference: Path, policy: Path, scratch: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import KTOConfig, KTOTrainer

        def load(place: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

        arguments = KTOConfig(
            output_dir=str(scratch), bf16=False, gradient_checkpointing=False, report_to="none", use_cpu=True,
            max_length=64, disable_tqdm=True, per_device_train_batch_size=2,
        )  # fmt: skip
        filler = Dataset.from_list([{"prompt": "w2 w3", "completion": " w4", "label": bool(i % 2)} for i in range(4)])
        self._trainer = KTOTrainer(
            load(policy), ref_model=load(reference), args=arguments, train_dataset=filler,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )  # fmt: skip

    def __call__(self, case: dict[str, Any], samples: list[Sample], scores: list[Score]) -> tuple[float, Gradient]:
        trainer = self._trainer
        settings = {"desirable_weight": 1.0, "undesirable_weight": 1.0, **case}
        settings["loss_type"] = settings.pop("name")
        settings["calculate_KL"] = settings["loss_type"] == "kto"
        for name, value in settings.items():
            assert hasattr(trainer, name), name
            setattr(trainer, name, value)
        good = {s.sample_id: bool(s.p_good) for s in scores}
        rows = [
            {
                "prompt_ids": list(s.prompt_ids),
                "completion_ids": list(s.response_ids),
                "KL_completion_ids": list(samples[i - RESPONSES].response_ids),  # of the prompt before
                "label": good[s.id],
            }
            for i, s in enumerate(samples)
        ]
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=False)
        loss.backward()
        named = trainer.model.named_parameters()
        return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def compare(seeds: int = 4) -> list[dict[str, Any]]:
    """Relative differences of every case on every batch, and this project's estimate of the KL."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        reference, policy = make_models(Path(scratch))
        ours, theirs = Ours(reference, policy), Theirs(reference, policy, Path(scratch))
        for case in CASES:
            for seed in range(seeds):
                samples, scores = make_data(seed)
                (row, slope), (value, peer) = ours(case, samples, scores), theirs(case, samples, scores)
                rows.append(
                    {
                        "case": json.dumps(case),
                        "loss": abs(row["loss"] - value) / abs(value),
                        "gradient": relative(slope, peer),
                        "z_ref": row.get("z_ref"),
                    }
                )
    return rows


def main() -> None:
    """Print the table."""
    rows = compare()
    for row in rows:
        z = "" if row["z_ref"] is None else f"z {row['z_ref']:.4f}"
        print(f"{row['case']:100} loss {row['loss']:.1e} gradient {row['gradient']:.1e} {z}")
    print(json.dumps(rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
