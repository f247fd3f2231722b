"""What aligned models make of a response: their mean token log-probability, each under its own tokenizer (PoFT).

The models read the prompt and the response as plain text, one behind the other, as the policy's own prompt was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.model_files import check_model_dir
from align.records import Sample, Verdict

if TYPE_CHECKING:
    from align.training.engine import PolicyEngine

ALIGNED = "training.supervised.aligned"
"""The key that names them."""


def from_models(engine: PolicyEngine, samples: Sequence[Sample], directories: Sequence[str]) -> dict[str, float]:
    """By sample id, the mean over the models of the mean token log-probability.  Collective: each rank does a share.

    The models are loaded one after the other.  A sample that some model reads as no token at all is not in the answer.
    """
    mine = [samples[i] for i in engine.ranks.share(len(samples))]
    prompts = engine.tokenizer.batch_decode([list(s.prompt_ids) for s in mine], skip_special_tokens=True)
    texts = [(prompt, s.text, s.finish_reason == "stop") for prompt, s in zip(prompts, mine, strict=True)]
    found: list[list[float | None]] = []
    for place, directory in enumerate(directories):
        check_model_dir(Path(directory), key=f"{ALIGNED}.{place}")
        found.append(_ask(Path(directory), texts, engine.device))
    columns = list(zip(*found, strict=True))
    means = {
        s.id: sum(v for v in column if v is not None) / len(column)
        for s, column in zip(mine, columns, strict=True)
        if None not in column
    }
    return {i: mean for part in engine.ranks.gather(means, "aligned models") for i, mean in part.items()}


def from_verdicts(verdicts: Sequence[Verdict], verifier: str) -> dict[str, float]:
    """The same where a verifier says it."""
    return {v.sample_id: v.value for v in verdicts if v.verifier == verifier and v.value is not None}


def _ask(directory: Path, texts: Sequence[tuple[str, str, bool]], device: torch.device) -> list[float | None]:
    """One model's mean token log-probability of each response: (prompt, response, whether it ended by itself)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", use_safetensors=True)
    model = model.to(device).eval()
    return [_mean_logprob(model, *_encode(tokenizer, *text), device) for text in texts]


def _encode(tokenizer: Any, prompt: str, response: str, ended: bool) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids; the response keeps its first space, and its end where it had one."""
    before = list(tokenizer(prompt)["input_ids"])
    joined = list(tokenizer(prompt + response)["input_ids"])
    after = joined[len(before) :] if joined[: len(before)] == before else None
    if after is None:
        after = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return before, [*after, end] if ended and end is not None else after


def _mean_logprob(model: Any, before: Sequence[int], after: Sequence[int], device: torch.device) -> float | None:
    if not before or not after:
        return None
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]], device=device)).logits[0, len(before) - 1 : -1].float()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(after, device=device)[:, None])
    return float(picked.double().mean())
