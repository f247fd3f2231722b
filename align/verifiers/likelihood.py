"""Log-probabilities of a text as a verdict, through vLLM in this process.

    backward_likelihood   mean over the prompt's tokens of log P(token | response, "The text above answers …", so far)
    sequence_likelihood   mean over the response's tokens of log P(token | prompt, so far)

The first is TRLM-Fo of 2312.02179 per token: a forward model asked for the question behind the answer.  Both know the
texts only, so they are tokenised by the model that reads them, with its own beginning of sequence and no chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifiers.language_engine import LanguageEngine
from align.verifiers.spec_models import BackwardLikelihoodSpec, LikelihoodBlock


class Likelihood(ModelVerifier):
    """The mean log-probability, in nats per token, of the prompt or of the response."""

    kind = "score"

    def __init__(self, spec: LikelihoodBlock, dtype: str, policy_dir: Callable[[], Path]) -> None:
        """Starts the engine; `policy_dir` gives the directory of the policy before training."""
        super().__init__(spec.name)
        self._template = spec.template if isinstance(spec, BackwardLikelihoodSpec) else None
        model = spec.model if spec.model is not None else str(policy_dir())
        self.engine = LanguageEngine(
            spec.name, model, spec.revision, spec.engine, max_tokens=spec.max_tokens, dtype=dtype
        )

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        """One mean a response; abstains where there is nothing to measure, or no room for it."""
        found = self.engine.logprobs([self.token_ids(item) for item in batch])
        means: list[float | Abstain] = []
        for item, row in zip(batch, found, strict=True):
            if self._template is None and not item.response:
                means.append(Abstain("the response is empty"))
            else:
                means.append(row if isinstance(row, Abstain) else sum(row) / len(row))
        return means

    def token_ids(self, item: Item) -> tuple[list[int], list[int]]:
        """(what stands before, what is measured)."""
        if self._template is None:
            before, text = item.prompt, item.response
        else:
            before, text = self._template.replace("{response}", item.response), item.question
        return self.engine.text_ids(before, first=True), self.engine.text_ids(text, first=False)

    def account(self) -> dict[str, float]:
        """Requests and tokens."""
        return dict(self.engine.account)

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()
