"""What answers questions for a verifier: a model in this process, or a server.

Either gives the probabilities of a few words as the whole answer, or a written answer.  What comes back is data: it is
measured and parsed, never followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from align.errors import InputError
from align.verifiers.base import Abstain
from align.verifiers.fence import Question
from align.verifiers.spec_models import AskedModel


class Answerer(Protocol):
    """A language model that can be asked; what it cost is in `account`."""

    account: Counter[str]

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> list[list[float] | Abstain]:
        """Per question the probability of each word as the answer; they need not add up to 1."""

    def write(self, questions: Sequence[Question], max_tokens: int) -> list[str | Abstain]:
        """Per question the answer as text, greedy."""

    def close(self) -> None:
        """Free what it holds."""


def start(spec: AskedModel, dtype: str) -> Answerer:
    """The engine or the connection that a recipe block describes."""
    if spec.endpoint is not None:
        from align.verifiers.endpoint import Endpoint

        return Endpoint.from_spec(spec)
    from align.verifiers.language_engine import LanguageEngine

    return LanguageEngine(spec.name, spec.model, spec.revision, spec.engine, max_tokens=spec.max_tokens, dtype=dtype)


def check(spec: AskedModel, where: str) -> None:
    """Refuse a model or a key that is not there; loads nothing heavy and asks nobody."""
    if spec.endpoint is not None:
        from align.verifiers.endpoint import read_key

        read_key(spec.key_variable, where)
        return
    from align.model_files import check_model_dir, resolve_model

    config = check_model_dir(resolve_model(spec.model, spec.revision, key=f"{where}.model"), key=f"{where}.model")
    names = config.get("architectures") or ["no architecture"]
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in names):
        raise InputError(f"{where}.model: {spec.model} is a {names[0]}; a language model is wanted (…ForCausalLM)")


def shares(chances: list[float] | Abstain, least_mass: float, words: Sequence[str]) -> list[float] | Abstain:
    """The words' probabilities made to add up to 1; none where they were too unlikely together to be an answer."""
    if isinstance(chances, Abstain):
        return chances
    mass = sum(chances)
    if mass <= 0.0 or mass < least_mass:
        return Abstain(f"the judge answers none of {', '.join(words)}: together {mass:.2g}, below {least_mass:g}")
    return [chance / mass for chance in chances]
