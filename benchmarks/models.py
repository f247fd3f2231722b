"""The model and the words of the side-by-side measurements: word i is written `wi` and has token id i."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY, EOS = 4096, 1

Words = list[int]


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model's size."""

    layers: int = 8
    width: int = 256


def make_model(directory: Path, shape: Shape) -> None:
    """Random weights and a word-level tokenizer, so that token counts are exact where a peer takes text only."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    vocabulary = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    ).save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=shape.width, intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // 64, num_key_value_heads=shape.width // 128,
        head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, eos_token_id=EOS,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


class Author:
    """Random words of exact length, the same in every process."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def words(self, count: int) -> Words:
        """So many random words."""
        return [self._rng.randrange(2, VOCABULARY) for _ in range(count)]

    def response(self, tokens: int) -> Words:
        """Words that end with EOS."""
        return [*self.words(tokens - 1), EOS]

    def reward(self) -> float:
        """A number in [0, 1)."""
        return self._rng.random()


def text(words: Words) -> str:
    """How the words are written."""
    return " ".join(f"w{i}" for i in words)
