"""What aligned models make of a response: their mean token log-probability, each under its own tokenizer (PoFT).

The models read the prompt and the response as plain text, one behind the other, as the policy's own prompt was.

Legend: B sequences of a batch, S positions of the longest, V vocabulary.
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
        found.append(_ask(Path(directory), texts, engine.recipe.training.tokens_per_batch, engine.device))
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


def _ask(
    directory: Path, texts: Sequence[tuple[str, str, bool]], token_budget: int, device: torch.device
) -> list[float | None]:
    """One model's mean token log-probability of each response: (prompt, response, whether it ended by itself).

    `token_budget` is the positions of a forward, padding included; it changes nothing but the time.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", use_safetensors=True)
    model = model.to(device).eval()
    encoded = [_encode(tokenizer, *text) for text in texts]
    asked = [i for i, (before, after) in enumerate(encoded) if before and after]
    found: list[float | None] = [None] * len(texts)
    for places in batches([len(encoded[i][0]) + len(encoded[i][1]) for i in asked], token_budget):
        chosen = [asked[place] for place in places]
        for i, mean in zip(chosen, _mean_logprobs(model, [encoded[i] for i in chosen], device), strict=True):
            found[i] = mean
    return found


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Places of the sequences of each batch, longest first: as many as the budget has room for at the longest's width.

    One that alone exceeds the budget is a batch of its own.
    """
    waiting = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = []
    while waiting:
        rows = max(1, token_budget // lengths[waiting[0]])
        found.append(waiting[:rows])
        waiting = waiting[rows:]
    return found


def _encode(tokenizer: Any, prompt: str, response: str, ended: bool) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids; the response keeps its first space, and its end where it had one."""
    before = list(tokenizer(prompt)["input_ids"])
    joined = list(tokenizer(prompt + response)["input_ids"])
    after = joined[len(before) :] if joined[: len(before)] == before else None
    if after is None:
        after = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return before, [*after, end] if ended and end is not None else after


def _mean_logprobs(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> list[float]:
    """The mean token log-probability of each response (prompt ids, response ids).

    Padding is on the right, where no token that counts can see it.
    """
    width = max(len(before) + len(after) for before, after in sequences)
    ids, seen = torch.zeros((2, len(sequences), width), dtype=torch.int64)  # [B, S]
    for row, (before, after) in enumerate(sequences):
        ids[row, : len(before) + len(after)] = torch.tensor([*before, *after])
        seen[row, : len(before) + len(after)] = 1
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), attention_mask=seen.to(device)).logits  # [B, S, V]
        means = []
        for row, (before, after) in enumerate(sequences):  # one by one: in float32 at once they would take much room
            steps = logits[row, len(before) - 1 : len(before) + len(after) - 1].float().log_softmax(-1)
            picked = steps.gather(1, torch.tensor(after, device=device)[:, None])
            means.append(picked.double().mean())
    return torch.stack(means).tolist()
