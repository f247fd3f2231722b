"""What the engine tests share: small models, recipes for them, and a trainer reduced to its weights and log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from align.recipe import Recipe, Scratch
from align.records import Prompt, content_id

SHAPE = Scratch(hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, head_dim=32, context=96)


def recipe_for(model_dir: Path, *, dtype: str = "float32", **sampling: Any) -> Recipe:
    """A recipe that names this model; `sampling` are keys of its sampling block."""
    return Recipe.model_validate(
        {
            "name": "engines",
            "policy": {"model": str(model_dir), "dtype": dtype},
            "prompts": {"source": "none.jsonl"},
            "sampling": {"max_new_tokens": 12, **sampling},
            "verifiers": [{"kind": "noise", "name": "coin"}],
        }
    )


def prompt_of(text: str, tokenizer: Any) -> Prompt:
    """A training prompt."""
    ids = tuple(tokenizer(text)["input_ids"])
    return Prompt(id=content_id(text), text=text, token_ids=ids, answer=None, split="train")


class Policy:
    """A transformers model that hands out weights and log-probs as the trainer does."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
        self.withheld: set[str] = set()

    def nudge(self, size: float, seed: int) -> None:
        """Move every weight by a normal draw of this standard deviation, as an optimizer step would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights but those withheld; a tied head under its own name too."""
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if name not in self.withheld:
                yield name, tensor.detach()

    def token_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Any:
        """Log-probs of each response, one sequence at a time: nothing here is packed or padded."""
        found = []
        with torch.no_grad():
            for prompt, response in sequences:
                logits = self.model(torch.tensor([[*prompt, *response]])).logits[0].float()
                steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                found.append(steps.gather(-1, torch.tensor(response)[:, None])[:, 0].numpy())
        return SimpleNamespace(logprobs=found)


def probes(vocabulary: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two sequences that between them use most of a small vocabulary."""
    walk = tuple(i * 7 % vocabulary for i in range(40))
    return [(walk[:3], walk[3:]), (walk[20:21], walk[21:])]
