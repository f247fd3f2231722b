"""Every preference loss of TRL 1.16 against this project's, loss and gradient, on the same random batches.

    python tests/parity/preference_trl.py

TRL's side is its trainers' own `_compute_loss` (DPO) and `get_batch_loss_metrics` (experimental CPO and ORPO) on padded
batches; this project's is `train_round` under DeepSpeed on packed groups in several micro-batches, stopped where the
optimizer would step.  Both hold the same tiny float32 model, moved away from its reference.  Prints a table and, as
its last line, the rows as JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from align.distributed import Ranks
from align.recipe import Recipe
from align.records import Pair, Sample
from align.training.engine import PolicyEngine
from align.training.trainers import RoundData, train_round

VOCABULARY, EOS = 32, 1
BATCHES = 2
Gradient = dict[str, torch.Tensor]
Tokens = tuple[int, ...]
Words = tuple[Tokens, Tokens, Tokens]  # prompt, chosen, rejected


@dataclass(frozen=True)
class Case:
    """One setting on both sides."""

    name: str
    ours: dict[str, Any]  # training.loss
    trainer: str  # dpo, cpo or orpo
    theirs: dict[str, Any] = field(default_factory=dict)  # attributes of the trainer
    one_token_prompts: bool = False


def dpo(name: str, loss_type: str | None = None, **settings: Any) -> Case:
    """A case of TRL's DPOTrainer from this project's settings."""
    beta = settings.pop("beta", 0.1)
    theirs: dict[str, Any] = {"beta": beta, "loss_types": [loss_type or name], "loss_weights": [1.0]}
    label = name
    for key, value in settings.items():
        if key == "nll_weight":
            theirs |= {"loss_types": [*theirs["loss_types"], "sft"], "loss_weights": [1.0, value]}
        elif key == "divergence":
            theirs["f_divergence_type"] = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(value, value)
        elif key not in ("reward_shift", "discopop_tau"):
            theirs[{"wpo": "use_weighting", "divergence_alpha": "f_alpha_divergence_coef"}.get(key, key)] = value
        if key not in ("reward_shift", "discopop_tau"):
            label += f" {key}={value}"
    ours = {"name": name, **settings} | ({} if name == "sft" else {"beta": beta})
    return Case(label, ours, "dpo", theirs)


def dpo_cases() -> list[Case]:
    """All 15 loss types of the DPOTrainer, each alone and with every modifier that both sides define for it."""
    margin = [
        ("dpo", "sigmoid", {}), ("hinge", "hinge", {}), ("ipo", "ipo", {}),
        ("exo", "exo_pair", {"label_smoothing": 0.1}), ("rdpo", "robust", {"label_smoothing": 0.2}),
        ("discopop", "discopop", {"discopop_tau": 0.05}), ("dpo_norm", "sigmoid_norm", {"beta": 2.0}),
    ]  # fmt: skip
    sided = [
        ("nca", "nca_pair", {}), ("bco", "bco_pair", {"reward_shift": "none"}), ("sppo_hard", "sppo_hard", {}),
        ("apo_zero", "apo_zero", {}), ("apo_down", "apo_down", {}),
    ]  # fmt: skip
    coupled = [("aot", "aot", {"label_smoothing": 0.1}), ("aot_unpaired", "aot_unpaired", {"label_smoothing": 0.1})]
    cases = [dpo("sft")]
    for name, theirs, own in margin + sided + coupled:
        cases += [dpo(name, theirs, **own), dpo(name, theirs, **own, ld_alpha=0.4)]
        cases.append(dpo(name, theirs, **own, nll_weight=0.7))
    for name, theirs, own in margin + sided:
        if name != "hinge":  # TRL 1.16 cannot: it multiplies the output of `relu` in place, and backward refuses
            cases.append(dpo(name, theirs, **own, wpo=True))
    for name, theirs, own in margin:
        for divergence in ("forward_kl", "js", "alpha"):
            alpha = {"divergence_alpha": 0.6} if divergence == "alpha" else {}
            cases.append(dpo(name, theirs, **own, divergence=divergence, **alpha))
    cases.append(dpo("dpo", "sigmoid", divergence="js", ld_alpha=0.3, wpo=True))
    cases += [dpo(name, name) for name in ("aot", "aot_unpaired")]  # without label smoothing
    return cases


def reference_free_cases() -> list[Case]:
    """CPO's losses with and without label smoothing and its likelihood term; ORPO.

    ORPO's trainer takes the likelihood of prompt and response, this project of the response; they are the same thing
    where the prompt is one token.
    """
    forms = [
        ("cpo", "sigmoid", {"beta": 0.1}, {}), ("cpo_hinge", "hinge", {"beta": 0.1}, {}),
        ("cpo_ipo", "ipo", {"beta": 0.1}, {}), ("simpo", "simpo", {"beta": 2.0}, {"simpo_gamma": 0.7}),
    ]  # fmt: skip
    cases = []
    for name, loss_type, beta, own in forms:
        for smoothing in (0.0, 0.2) if name in ("cpo", "simpo") else (0.0,):
            for nll in (0.0, 0.5):
                ours = {"name": name, "nll_weight": nll, **beta, **own}
                if smoothing:
                    ours["label_smoothing"] = smoothing
                theirs = {"loss_type": loss_type, "cpo_alpha": nll, "label_smoothing": smoothing, **beta, **own}
                label = f"{name}" + (f" label_smoothing={smoothing}" if smoothing else "")
                cases.append(Case(label + (f" nll_weight={nll}" if nll else ""), ours, "cpo", theirs))
    ours = {"name": "orpo", "nll_weight": 1.0, "beta": 0.3}
    cases.append(Case("orpo nll_weight=1.0", ours, "orpo", {"beta": 0.3}, one_token_prompts=True))
    return cases


# ---- the model and the batches -------------------------------------------------------------------------------------


def make_models(directory: Path) -> tuple[Path, Path]:
    """(reference, policy): a small model with a word-level tokenizer, and the same with its weights moved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    vocabulary = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<pad>"
    )
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=EOS, bos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    places = directory / "reference", directory / "policy"
    for place in places:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return places


def make_data(seed: int, one_token_prompts: bool) -> tuple[list[Pair], dict[str, Sample]]:
    """Prompts and responses of random length; pairs of one prompt share a response, labels are hard."""
    rng = random.Random(seed)
    samples: dict[str, Sample] = {}
    pairs: list[Pair] = []
    for p in range(6):
        prompt = tuple(rng.randrange(2, VOCABULARY) for _ in range(1 if one_token_prompts else rng.randrange(1, 12)))
        for g in range(3):
            response = tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(0, 11))) + (EOS,)
            samples[f"{p}.{g}"] = Sample(
                id=f"{p}.{g}", prompt_id=f"{p}", index=g, policy_version=0, seed=0, prompt_ids=prompt,
                response_ids=response, logprobs=(), text="", finish_reason="stop", temperature=1.0, top_p=1.0, top_k=0,
                max_new_tokens=20,
            )  # fmt: skip
        for other in (1, 2)[: 1 + p % 2]:
            pairs.append(Pair(f"{p}.{other}", f"{p}", f"{p}.0", f"{p}.{other}", 1.0, 0.0, 1.0, 1.0, "test"))
    return pairs, samples


def words_of(pairs: Sequence[Pair], samples: dict[str, Sample]) -> list[Words]:
    """Prompt, chosen and rejected ids of each pair."""
    return [
        (samples[p.chosen_id].prompt_ids, samples[p.chosen_id].response_ids, samples[p.rejected_id].response_ids)
        for p in pairs
    ]


# ---- the two sides -------------------------------------------------------------------------------------------------


class Ours:
    """`train_round`, with the gradient taken where the optimizer would step."""

    def __init__(self, reference: Path, policy: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = str(reference)
        self._engine = PolicyEngine(reference, self._recipe({}), Ranks(), total_steps=1)
        self._engine.model.load_state_dict(AutoModelForCausalLM.from_pretrained(policy).state_dict())
        self._gradient: Gradient = {}
        self._engine.apply = self._take  # type: ignore[method-assign]

    def _recipe(self, loss: dict[str, Any]) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "parity",
                "policy": {"model": self._model, "dtype": "float32"},
                "verifiers": [{"kind": "repetition", "name": "filler"}],
                "pairs": {"labels": "hard"},
                "training": {"loss": loss, "pairs_per_step": 1000, "tokens_per_batch": 80, "logit_chunk_tokens": 16},
            }
        )

    def _take(self) -> bool:
        named = dict(self._engine.model.named_parameters())
        self._gradient = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        return True

    def __call__(self, case: Case, pairs: list[Pair], samples: dict[str, Sample]) -> tuple[float, Gradient]:
        rows: list[dict[str, Any]] = []
        data = RoundData(0, samples=samples, pairs=pairs)
        train_round(self._engine, data, self._recipe(case.ours), rows.append)
        return rows[0]["loss"], self._gradient


class Theirs:
    """TRL's trainers, each made once; a case sets their attributes."""

    def __init__(self, reference: Path, policy: Path, scratch: Path) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        def load(place: Path) -> Any:
            return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

        common = {
            "output_dir": str(scratch), "bf16": False, "gradient_checkpointing": False, "report_to": "none",
            "use_cpu": True, "max_length": 64, "disable_tqdm": True,
        }  # fmt: skip
        filler = Dataset.from_list([{"prompt": "w2 w3", "chosen": " w4", "rejected": " w5"}] * 2)
        shared = {"train_dataset": filler, "processing_class": AutoTokenizer.from_pretrained(policy)}
        self._trainers: dict[str, Any] = {
            "dpo": DPOTrainer(
                load(policy), ref_model=load(reference), args=DPOConfig(**common, use_weighting=True), **shared
            ),
            "cpo": CPOTrainer(load(policy), args=CPOConfig(**common, loss_type="simpo"), **shared),
            "orpo": ORPOTrainer(load(policy), args=ORPOConfig(**common), **shared),
        }
        names = [n for case in (*dpo_cases(), *reference_free_cases()) if case.trainer == "dpo" for n in case.theirs]
        self._stock = {name: getattr(self._trainers["dpo"], name) for name in names}
        self._stock["use_weighting"] = False  # on while it was made, for the head is told then what to return

    def __call__(self, case: Case, words: Sequence[Words]) -> tuple[float, Gradient]:
        trainer = self._trainers[case.trainer]
        settings = (self._stock if case.trainer == "dpo" else {}) | case.theirs
        for name, value in settings.items():
            assert hasattr(trainer, name), name
            setattr(trainer, name, value)
        model = trainer.model
        model.train()
        model.zero_grad()
        loss = self._dpo(trainer, words) if case.trainer == "dpo" else self._reference_free(trainer, words)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def _dpo(self, trainer: Any, words: Sequence[Words]) -> torch.Tensor:
        rows = [
            {"prompt_ids": list(p), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
            for p, chosen, rejected in words
        ]
        return trainer._compute_loss(trainer.model, trainer.data_collator(rows), return_outputs=False)

    def _reference_free(self, trainer: Any, words: Sequence[Words]) -> torch.Tensor:
        batch: dict[str, torch.Tensor] = {}
        for side, place in (("chosen", 1), ("rejected", 2)):
            rows = [(list(w[0]), list(w[place])) for w in words]
            width = max(len(p) + len(r) for p, r in rows)

            def padded(make: Callable[[list[int], list[int]], list[int]], fill: int) -> torch.Tensor:
                made = [make(p, r) for p, r in rows]  # noqa: B023  used at once
                return torch.tensor([m + [fill] * (width - len(m)) for m in made])  # noqa: B023

            batch[f"{side}_input_ids"] = padded(lambda p, r: p + r, 0)
            batch[f"{side}_attention_mask"] = padded(lambda p, r: [1] * len(p + r), 0)
            batch[f"{side}_labels"] = padded(lambda p, r: [-100] * len(p) + r, -100)
        return trainer.get_batch_loss_metrics(trainer.model, batch)[0]


def relative(ours: Gradient, theirs: Gradient) -> float:
    """Norm of the difference over the norm, of all gradients as one vector."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    difference = sum((ours[n] - theirs[n]).double().square().sum() for n in ours)
    whole = sum(theirs[n].double().square().sum() for n in theirs)
    return float((difference / whole) ** 0.5)


def compare() -> list[dict[str, Any]]:
    """The largest relative differences of every case over the batches."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        reference, policy = make_models(Path(scratch))
        ours, theirs = Ours(reference, policy), Theirs(reference, policy, Path(scratch))
        for case in (*dpo_cases(), *reference_free_cases()):
            row: dict[str, Any] = {"case": case.name, "trainer": case.trainer, "loss": 0.0, "gradient": 0.0}
            row["loss_type"] = case.theirs.get("loss_type", case.theirs.get("loss_types", [""])[0])
            for seed in range(BATCHES):
                pairs, samples = make_data(seed, case.one_token_prompts)
                (a, a_slope), (b, b_slope) = ours(case, pairs, samples), theirs(case, words_of(pairs, samples))
                row["loss"] = max(row["loss"], abs(a - b) / abs(b))
                row["gradient"] = max(row["gradient"], relative(a_slope, b_slope))
                row["value"] = b
            rows.append(row)
    return rows


def main() -> None:
    """Print the table."""
    rows = compare()
    print(f"{'TRL trainer':12} {'case':60} {'loss':>9} {'gradient':>9}   relative difference, largest of {BATCHES}")
    for row in sorted(rows, key=lambda r: -max(r["loss"], r["gradient"])):
        print(f"{row['trainer']:12} {row['case']:60} {row['loss']:9.1e} {row['gradient']:9.1e}")
    print(json.dumps(rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
