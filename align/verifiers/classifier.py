"""A sequence classifier as a verifier: the probability of one of its labels, such as a guard model's `safe`.

softmax over the labels; a classifier that says it is multi-label, or has one label, gets its logit's sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.model_files import check_model_dir, resolve_model
from align.sampling import environment
from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifiers.fence import break_tokens, defuse
from align.verifiers.spec_models import ClassifierSpec

BATCH = 16  # texts that transformers takes at a time


def check(spec: ClassifierSpec, where: str) -> tuple[Path, dict[str, Any], int]:
    """The checkpoint's directory, config.json and the index of the label; refuses one that has no such label."""
    environment.check_engine_settings(spec.engine, f"{where}.engine")
    path = resolve_model(spec.model, spec.revision, key=f"{where}.model")
    config = check_model_dir(path, key=f"{where}.model")
    names = config.get("architectures") or ["no architecture"]
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise InputError(f"{where}.model: {path} is a {names[0]}; a classifier is wanted (…ForSequenceClassification)")
    labels = {str(name): int(index) for index, name in (config.get("id2label") or {}).items()}
    if spec.label not in labels:
        listed = ", ".join(sorted(labels, key=lambda name: labels[name])[:20]) or "none (no id2label in config.json)"
        raise InputError(f"{where}.label: {path} has no label {spec.label!r}; it has {listed}")
    return path, config, labels[spec.label]


class Classifier(ModelVerifier):
    """P(label) of each response."""

    kind = "score"

    def __init__(self, spec: ClassifierSpec, dtype: str = "bfloat16") -> None:
        """Starts the engine, in the number format `dtype`.  Collective: every rank makes its own at the same time."""
        super().__init__(spec.name)
        self._spec = spec
        path, config, self._label = check(spec, f"verifiers.{spec.name}")
        several = config.get("problem_type") == "multi_label_classification"
        self._apart = several or len(config.get("id2label") or ()) == 1

        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        if spec.text == "chat" and not self._tokenizer.chat_template:
            raise InputError(f"verifiers.{spec.name}.text: {spec.model} has no chat template; choose another form")
        given = [n for n in (environment.context_length(config), spec.max_tokens) if n is not None]
        self.max_tokens = min(given) if given else 2**31
        self._llm: Any = None
        self._model: Any = None
        if spec.through == "vllm":
            self._start_vllm(path, config, dtype, min(given) if given else None)
        else:
            self._start_transformers(path, dtype)
        self._tokens_read = self._requests = 0

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """P(label) in [0, 1]; abstains where a text does not fit."""
        inputs = [self.input_ids(item) for item in batch]
        fits = [i for i, ids in enumerate(inputs) if 0 < len(ids) <= self.max_tokens]
        logits = dict(zip(fits, self._logits([inputs[i] for i in fits]), strict=True))
        self._requests += len(fits)
        self._tokens_read += sum(len(inputs[i]) for i in fits)
        return [
            chance(logits[i], self._label, apart=self._apart)
            if i in logits
            else Abstain(f"{len(ids)} tokens, and the classifier takes 1 to {self.max_tokens}")
            for i, ids in enumerate(inputs)
        ]

    def input_ids(self, item: Item) -> list[int]:
        """The classifier's own tokens."""
        form, tokenizer = self._spec.text, self._tokenizer
        if form == "chat":
            said = [(role, defuse(text, tokenizer.all_special_tokens)) for role, text in item.conversation()]
            turns = [{"role": role, "content": text} for role, text in said]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        response = break_tokens(item.response, tokenizer.all_special_tokens)
        if form == "pair":
            return list(tokenizer(item.question, response)["input_ids"])
        return list(tokenizer(item.prompt + response if form == "joined" else response)["input_ids"])

    def account(self) -> dict[str, float]:
        """Requests and tokens."""
        return {"requests": self._requests, "tokens_read": self._tokens_read}

    def close(self) -> None:
        """Free the memory."""
        self._model = None
        if self._llm is not None:
            llm, self._llm = self._llm, None
            environment.close_llm(llm)

    def _start_vllm(self, path: Path, config: Mapping[str, Any], dtype: str, limit: int | None) -> None:
        settings: dict[str, Any] = {"dtype": dtype, "runner": "pooling"}
        settings |= environment.device_defaults(config, dtype, limit)
        if limit is not None:
            settings["max_model_len"] = limit
        settings |= self._spec.engine
        key = f"verifiers.{self.name}.engine"
        from align.verifiers.language_engine import _world_size

        self._llm = environment.make_llm(path, config, settings, key, world_size=_world_size())
        self.max_tokens = self._llm.model_config.max_model_len

    def _start_transformers(self, path: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        self._device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
        self._model = model.eval().to(self._device)

    def _logits(self, inputs: Sequence[list[int]]) -> list[list[float]]:
        """Per input the raw logit of every label."""
        if not inputs:
            return []
        if self._llm is not None:
            from vllm import PoolingParams

            self._llm.reset_prefix_cache()  # so that a score depends on its batch only
            requests = [{"prompt_token_ids": ids} for ids in inputs]
            outputs = self._llm.classify(requests, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
            return [[float(x) for x in output.outputs.probs] for output in outputs]
        return [row for start in range(0, len(inputs), BATCH) for row in self._padded(inputs[start : start + BATCH])]

    def _padded(self, inputs: Sequence[list[int]]) -> list[list[float]]:
        import torch

        width = max(map(len, inputs))
        pad = self._model.config.pad_token_id
        if pad is None:
            return [self._run(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0] for ids in inputs]
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in inputs])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in inputs])
        return self._run(ids, mask)

    def _run(self, ids: Any, mask: Any) -> list[list[float]]:
        import torch

        with torch.no_grad():
            logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
        return logits.float().tolist()


def chance(logits: Sequence[float], label: int, *, apart: bool) -> float | Abstain:
    """P(label): softmax, or the sigmoid of its own logit where the labels stand `apart`."""
    if not all(map(math.isfinite, logits)):
        return Abstain("the classifier gives no finite number")
    if apart:
        return 0.5 * (1.0 + math.tanh(0.5 * logits[label]))
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return weights[label] / sum(weights)
