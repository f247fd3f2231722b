"""vLLM in this process: prompts and seeds in, samples with their log-probs out.

Token ids go in and come out; text is decoded for verifiers and for people only.  Every request has its own seed and
every call starts with an empty prefix cache, so a call's result depends on the weights and on its arguments alone,
bit for bit: not on the process, nor on what was sampled before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align.errors import InputError, RunError
from align.model_files import check_model_dir
from align.recipe import Recipe
from align.records import Prompt, Sample, content_id
from align.sampling import environment
from align.training.control import control_of

if TYPE_CHECKING:
    import torch

    from align.distributed import Ranks

_DECODE_TAIL = 8  # prompt tokens decoded in front of a response, so that its first space is not lost


class Drawn(NamedTuple):
    """How responses are drawn."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


class Sampler:
    """One rank's vLLM engine.  Making one is collective: every rank makes its own at the same time."""

    def __init__(self, model_dir: Path, recipe: Recipe, ranks: Ranks) -> None:
        environment.check_engine_settings(recipe.sampling.engine, "sampling.engine")
        config = check_model_dir(model_dir)
        self.ranks, self._settings = ranks, recipe.sampling
        self.tied = bool(config.get("text_config", config).get("tie_word_embeddings", False))
        self.dtype: str = recipe.policy.dtype
        self.syncs = 0  # weight deliveries so far
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        control = control_of(recipe, self._tokenizer)
        self._bias = {token: -100.0 for token in control.banned} or None
        arguments: dict[str, Any] = {
            "dtype": recipe.policy.dtype,
            "seed": recipe.seed,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "max_model_len": _longest(recipe, config, control.longest),
        }
        arguments |= environment.device_defaults(config, recipe.policy.dtype, arguments["max_model_len"])
        arguments |= recipe.sampling.engine
        self.llm = environment.make_llm(model_dir, config, arguments, "sampling.engine", world_size=ranks.world_size)
        self.context: int = self.llm.model_config.max_model_len
        self.stop_ids = stop_ids(model_dir, self._tokenizer.eos_token_id)

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        policy_version: int,
        n: int,
        temperature: float,
        purpose: Literal["train", "eval", "rollout", "preflight"],
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        used: Sequence[int] | None = None,
        greedy: int = 0,
    ) -> list[Sample]:
        """`n` responses to each prompt, in prompt order and then by index, and behind them `greedy` greedy ones (0, 1).

        `used` says how many of each prompt's tokens are the begin of a response: they count in `max_new_tokens`.
        """
        if not prompts:
            return []
        room = [self._settings.max_new_tokens - tokens for tokens in used or [0] * len(prompts)]
        for prompt, tokens in zip(prompts, room, strict=True):
            self._check_fits(prompt, tokens)
        self.llm.reset_prefix_cache()
        requests, parameters, seeds, drawn = [], [], [], []
        for prompt, tokens in zip(prompts, room, strict=True):
            how = [Drawn(temperature, top_p, top_k, tokens)] * n + [Drawn(0.0, 1.0, 0, tokens)] * greedy
            for index, chosen in enumerate(how):
                seeds.append(int(content_id(seed, purpose, prompt.id, policy_version, index), 16) % 2**31)
                parameters.append(self._parameters(chosen, seeds[-1]))
                requests.append({"prompt_token_ids": list(prompt.token_ids)})
            drawn += how
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        asked = [prompt for prompt in prompts for _ in range(n + greedy)]
        texts = self._decode([(p.token_ids, c.token_ids) for p, c in zip(asked, completions, strict=True)])
        return [
            _record(prompt, i % (n + greedy), policy_version, request_seed, completion, text, how)
            for i, (prompt, request_seed, completion, text, how) in enumerate(
                zip(asked, seeds, completions, texts, drawn, strict=True)
            )
        ]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first, given those before it; a sequence must leave room for one."""
        return prompt_logprobs(self.llm, sequences)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Replace the engine's weights, in checkpoint form and names; returns its parameters that nothing came for.

        Use `align.sampling.weights.sync`, which also proves that what arrived is what was sent.
        """
        missing = self.llm.collective_rpc(_reload, args=(weights,))[0]
        self.syncs += 1
        self.llm.reset_prefix_cache()
        return missing

    def close(self) -> None:
        """Free the engine's memory; the process group stays."""
        llm = self.__dict__.pop("llm", None)
        if llm is not None:
            environment.close_llm(llm)

    def _parameters(self, drawn: Drawn, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=drawn.top_k,
            max_tokens=drawn.max_new_tokens,
            seed=seed,
            stop_token_ids=list(self.stop_ids),
            logprobs=0,
            logit_bias=self._bias,
            detokenize=False,
            skip_clone=True,  # made for one request: vLLM's deep copy of it is a tenth of a small model's sampling time
        )

    def _check_fits(self, prompt: Prompt, room: int) -> None:
        length = len(prompt.token_ids)
        if length + room > self.context:
            raise InputError(
                f"prompt {prompt.id} has {length} tokens and sampling.max_new_tokens is {room}: together over the "
                f"sampler's context of {self.context}. Lower prompts.max_tokens or sampling.max_new_tokens. The prompt "
                f"begins {prompt.text[:60]!r}"
            )

    def _decode(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str]:
        """Response texts as they continue the prompt's text, without special tokens.

        Decoded by itself, a response would lose its leading space in many tokenizers.
        """
        decode = self._tokenizer.batch_decode
        tails = decode([list(p[-_DECODE_TAIL:]) for p, _ in pairs], skip_special_tokens=True)
        joined = decode([[*p[-_DECODE_TAIL:], *r] for p, r in pairs], skip_special_tokens=True)
        alone = decode([list(r) for _, r in pairs], skip_special_tokens=True)
        return [j[len(t) :] if j.startswith(t) else a for t, j, a in zip(tails, joined, alone, strict=True)]


def _record(prompt: Prompt, index: int, version: int, seed: int, output: Any, text: str, drawn: Drawn) -> Sample:
    response = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(response, output.logprobs, strict=True))
    if output.finish_reason not in ("stop", "length") or not all(map(math.isfinite, logprobs)):
        raise RunError(
            f"the sampler gave no usable response to prompt {prompt.id} (finish reason {output.finish_reason}, "
            f"log-probs {logprobs[:3]}…): the policy's weights may hold NaN or infinity"
        )
    return Sample(
        id=content_id(prompt.id, version, seed, index),
        prompt_id=prompt.id,
        index=index,
        policy_version=version,
        seed=seed,
        prompt_ids=tuple(prompt.token_ids),
        response_ids=response,
        logprobs=logprobs,
        text=text,
        finish_reason=output.finish_reason,
        temperature=drawn.temperature,
        top_p=drawn.top_p,
        top_k=drawn.top_k,
        max_new_tokens=drawn.max_new_tokens,
    )


def prompt_logprobs(llm: Any, sequences: Sequence[Sequence[int]], adapter: Any = None) -> list[list[float]]:
    """An engine's natural log-probs of every token but the first: per sequence [length - 1]."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    requests = [{"prompt_token_ids": list(s)} for s in sequences]
    outputs = llm.generate(requests, parameters, use_tqdm=False, lora_request=adapter)
    return [
        [step[token].logprob for token, step in zip(s[1:], o.prompt_logprobs[1:], strict=True)]
        for s, o in zip(sequences, outputs, strict=True)
    ]


def stop_ids(model_dir: Path, eos_token_id: int | None) -> list[int]:
    """Token ids that end a response: the tokenizer's end of sequence, and those of generation_config.json."""
    file = model_dir / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    return sorted({*listed, *([] if eos_token_id is None else [eos_token_id])})


def _longest(recipe: Recipe, config: dict[str, Any], control: int) -> int | None:
    """Longest sequence the engine must hold, where the recipe bounds it below the model's context; else None.

    `control` is the tokens of a control text in front of the prompt.
    """
    context, limit = environment.context_length(config), recipe.prompts.max_tokens
    if limit is None or context is None:
        return None
    return min(context, limit + control + recipe.sampling.max_new_tokens)


def _reload(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Runs inside the engine: vLLM's in-place reload, and which parameters it did not touch.

    `reload_weights` repacks weights for the kernels of this machine, which `model.load_weights` alone does not.  It
    keeps the list of loaded names to itself (vLLM 0.25 to 0.32), so that list is caught on its way.
    """
    model = worker.model_runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    load = model.load_weights
    loaded: set[str] = set()

    def watched(*args: Any, **kwargs: Any) -> Any:
        names = load(*args, **kwargs)
        loaded.update(expected if names is None else names)
        return names

    model.load_weights = watched
    try:
        worker.reload_weights(weights_iterator=iter(weights))
    finally:
        del model.load_weights
    return expected - loaded
