"""A language model through vLLM in this process: probabilities of given words, of given texts, and written answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from align.model_files import check_model_dir, resolve_model
from align.sampling import environment
from align.sampling.engine import prompt_logprobs, stop_ids
from align.verifiers.base import Abstain
from align.verifiers.fence import Question, render


class LanguageEngine:
    """One engine beside the sampler's.  Collective: every rank makes its own at the same time."""

    def __init__(
        self, name: str, model: str, revision: str | None, engine: Mapping[str, Any], *, max_tokens: int | None,
        dtype: str,
    ) -> None:  # fmt: skip
        key = f"verifiers.{name}"
        path = resolve_model(model, revision, key=f"{key}.model")
        config = check_model_dir(path, key=f"{key}.model")

        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.special = tuple(sorted({*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}))
        context = environment.context_length(config)
        given = [limit for limit in (context, None if max_tokens is None else max_tokens + 1) if limit is not None]
        limit = min(given) if given else None
        settings: dict[str, Any] = {"dtype": dtype, "skip_tokenizer_init": True, "generation_config": "vllm"}
        settings |= {"logprobs_mode": "raw_logprobs"}
        settings |= environment.device_defaults(config, dtype, limit)
        if limit is not None:
            settings["max_model_len"] = limit
        settings |= engine
        self._llm = environment.make_llm(path, config, settings, f"{key}.engine", world_size=_world_size())
        self.max_tokens: int = self._llm.model_config.max_model_len - 1  # vLLM wants room for one token more
        self._stop_ids = stop_ids(path, self.tokenizer.eos_token_id)
        self.account: Counter[str] = Counter()

    def logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float] | Abstain]:
        """Per (before [P >= 1], text [T >= 1]) the log-probability of each token of the text: [T]."""
        fits = [i for i, (a, b) in enumerate(pairs) if a and b and len(a) + len(b) <= self.max_tokens]
        found = prompt_logprobs(self._llm, [[*pairs[i][0], *pairs[i][1]] for i in fits]) if fits else []
        rows = dict(zip(fits, found, strict=True))
        self.account.update(requests=len(fits), tokens_read=sum(len(row) + 1 for row in found))
        return [
            rows[i][len(before) - 1 :] if i in rows else self._too_long(len(before), len(text))
            for i, (before, text) in enumerate(pairs)
        ]

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> list[list[float] | Abstain]:
        """exp of the summed log-probabilities of each word's tokens behind the question."""
        endings = [self._ids(self._word(word)) for word in words]
        pairs = [(before, ending) for before in map(self._before, questions) for ending in endings]
        found = self.logprobs(pairs)
        chances: list[list[float] | Abstain] = []
        for start in range(0, len(pairs), len(words)):
            row = found[start : start + len(words)]
            refused = [each for each in row if isinstance(each, Abstain)]
            chances.append(refused[0] if refused else [math.exp(sum(each)) for each in row])  # type: ignore[arg-type]
        return chances

    def write(self, questions: Sequence[Question], max_tokens: int) -> list[str | Abstain]:
        """Greedy answers; one that is cut off, or finds no room, is none."""
        from vllm import SamplingParams

        inputs = [self._before(question) for question in questions]
        fits = [i for i, ids in enumerate(inputs) if len(ids) + max_tokens <= self.max_tokens + 1]
        how = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(self._stop_ids), detokenize=False
        )
        self._llm.reset_prefix_cache()
        requests = [{"prompt_token_ids": inputs[i]} for i in fits]
        outputs = [o.outputs[0] for o in self._llm.generate(requests, how, use_tqdm=False)] if fits else []
        rows = dict(zip(fits, outputs, strict=True))
        self.account.update(requests=len(fits), tokens_read=sum(len(inputs[i]) for i in fits))
        self.account.update(tokens_written=sum(len(output.token_ids) for output in outputs))
        answers: list[str | Abstain] = []
        for i, ids in enumerate(inputs):
            if i not in rows:
                answers.append(self._too_long(len(ids), max_tokens))
            elif rows[i].finish_reason != "stop":
                answers.append(Abstain("the judge's answer was cut off; raise answer_tokens"))
            else:
                answers.append(str(self.tokenizer.decode(list(rows[i].token_ids), skip_special_tokens=True)))
        return answers

    def close(self) -> None:
        """Free the engine's memory."""
        llm = self.__dict__.pop("_llm", None)
        if llm is not None:
            environment.close_llm(llm)

    def text_ids(self, text: str, *, first: bool) -> list[int]:
        """The model's own tokens of a text, with those that only begin a sequence where it is the `first`."""
        ids = list(self.tokenizer(text, add_special_tokens=first)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids[:-1] if first and ids and ids[-1] == end and len(ids) > 1 else ids

    def _ids(self, text: str) -> list[int]:
        return self.text_ids(text, first=False)

    def _word(self, word: str) -> str:
        """As it stands behind the question: a chat template ends with a line of its own, plain text needs a blank."""
        return word if self.tokenizer.chat_template else f" {word}"

    def _before(self, question: Question) -> list[int]:
        system, user = render(question, self.special)
        if not self.tokenizer.chat_template:
            return self.text_ids(f"{system}\n\n{user}\n\nAnswer:", first=True)
        from jinja2 import TemplateError

        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError):  # many templates refuse a system message
            turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._ids(str(text))

    def _too_long(self, before: int, more: int) -> Abstain:
        return Abstain(f"{before} + {more} tokens, and the model takes 1 + 1 to {self.max_tokens}")


def _world_size() -> int:
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
