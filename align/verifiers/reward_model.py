"""A reward-model checkpoint as a verifier: one raw logit per response, from a second vLLM engine in this process.

Where reward models go wrong between training and serving, and what is done about it here:
- vLLM passes a single label through a sigmoid unless it is told not to: the raw logit is asked for, because a sigmoid
  flattens the differences between good responses.
- The score is read at the last token.  Nothing is padded here, so it is the last real one; a trainer that pads with
  the end-of-sequence token read one token earlier where an input ends with it, so `append_eos` is refused there.
- A template's text holds its own beginning-of-sequence token: it is not added twice.
- An input that is too long is not cut: the verifier abstains and says so.
- A response that spells a special token (`<|im_end|>`) would end its own turn: the token is broken by a blank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from align.errors import InputError
from align.model_files import check_model_dir, resolve_model
from align.sampling import environment
from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifiers.fence import break_tokens
from align.verifiers.spec import RewardModelSpec


def check(spec: RewardModelSpec, where: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's directory and config.json; refuses one that cannot score.  Loads nothing heavy.

    `where` is the recipe key of the block, by default `verifiers.<name>`.
    """
    key = where or f"verifiers.{spec.name}"
    environment.check_engine_settings(spec.engine, f"{key}.engine")
    path = resolve_model(spec.model, spec.revision, key=f"{key}.model")
    return path, check_scorer(path, f"{key}.model")


def check_scorer(path: Path, key: str) -> dict[str, Any]:
    """The config.json of a directory that must hold a sequence classifier with one label; `key` names it."""
    config = check_model_dir(path, key=key)
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise InputError(
            f"{key}: {path / 'config.json'} names {', '.join(architectures) or 'no architecture'}; a reward "
            "model is a sequence classifier (…ForSequenceClassification)"
        )
    labels = label_count(config)
    if labels != 1:
        raise InputError(f"{key}: {path} has {labels} labels; a reward model has one (num_labels in config.json)")
    return config


def label_count(config: Mapping[str, Any]) -> int:
    """How many labels a config.json stands for: transformers writes `id2label`, and leaves it out where it is 2."""
    if "id2label" in config:
        return len(config["id2label"])
    return int(config.get("num_labels", 2))


class RewardModel(ModelVerifier):
    """Scores with `model`; larger is better, and only differences mean anything."""

    kind: ClassVar[Literal["binary", "score"]] = "score"

    def __init__(self, spec: RewardModelSpec, dtype: str = "bfloat16") -> None:
        """Starts the engine, in the number format `dtype`.  Collective: every rank makes its own at the same time."""
        super().__init__(spec.name)
        path, config = check(spec)
        self._spec, key = spec, f"verifiers.{spec.name}.engine"

        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._refuse_misread_ends(config)
        limit = _shorter(environment.context_length(config), spec.max_tokens)
        settings: dict[str, Any] = {"dtype": dtype, "runner": "pooling"}
        settings |= environment.device_defaults(config, dtype, limit)
        if limit is not None:
            settings["max_model_len"] = limit
        settings |= spec.engine
        self._llm = environment.make_llm(path, config, settings, key, world_size=_world_size())
        self.max_tokens: int = self._llm.model_config.max_model_len
        self._account: Counter[str] = Counter()

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """The raw logit of each response, or an abstention where it does not fit."""
        inputs = [self.input_ids(item) for item in batch]
        fits = [i for i, ids in enumerate(inputs) if 0 < len(ids) <= self.max_tokens]
        scores = dict(zip(fits, self._logits([inputs[i] for i in fits]), strict=True))
        self._account.update(requests=len(fits), tokens_read=sum(len(inputs[i]) for i in fits))
        return [scores[i] if i in scores else self._too_long(len(ids)) for i, ids in enumerate(inputs)]

    def _logits(self, inputs: Sequence[list[int]]) -> list[float]:
        from vllm import PoolingParams

        if not inputs:
            return []
        self._llm.reset_prefix_cache()  # so that a score depends on its batch only
        requests = [{"prompt_token_ids": ids} for ids in inputs]
        outputs = self._llm.classify(requests, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in outputs]

    def input_ids(self, item: Item) -> list[int]:
        """The reward model's own tokens of prompt and response."""
        tokenizer = self._tokenizer
        special = tokenizer.all_special_tokens
        if self._spec.chat_template:
            said = [(role, break_tokens(text, special)) for role, text in item.conversation()]
            turns = [{"role": role, "content": text} for role, text in said]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(item.prompt + break_tokens(item.response, special))["input_ids"]
        if self._spec.append_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return ids

    def account(self) -> dict[str, float]:
        """Requests and tokens."""
        return dict(self._account)

    def close(self) -> None:
        """Free the engine's memory."""
        llm = self.__dict__.pop("_llm", None)
        if llm is not None:
            environment.close_llm(llm)

    def _too_long(self, length: int) -> Abstain:
        return Abstain(f"{length} tokens, and the reward model takes 1 to {self.max_tokens}")

    def _refuse_misread_ends(self, config: Mapping[str, Any]) -> None:
        """A padding token that is also the end of sequence makes transformers read the score one token early."""
        pad, eos = config.get("pad_token_id"), self._tokenizer.eos_token_id
        where = f"verifiers.{self.name}"
        if self._spec.chat_template and not self._tokenizer.chat_template:
            raise InputError(f"{where}.chat_template: {self._spec.model} has no chat template; set it to false")
        if self._spec.append_eos and (eos is None or self._spec.chat_template):
            why = "the tokenizer has no such token" if eos is None else "a chat template ends its turns itself"
            raise InputError(f"{where}.append_eos: {why}; set it to false")
        if self._spec.append_eos and pad == eos:
            raise InputError(
                f"{where}.append_eos: {self._spec.model} pads with its end-of-sequence token ({eos}), so in "
                "transformers its score was read before that token; set append_eos to false"
            )


def _shorter(*limits: int | None) -> int | None:
    """The smallest limit that is given."""
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None


def _world_size() -> int:
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
