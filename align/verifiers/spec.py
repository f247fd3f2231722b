"""What a recipe may say of a verifier: one class per `kind`, all in one union.

Only pydantic is imported here, so that a recipe is checked before anything heavy loads.  The classes that do
the work stand in the modules beside this one; `align.verifiers.registry` maps each kind to its class.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.verifiers.spec_base import VerifierBlock, compile_pattern
from align.verifiers.spec_checks import CodeTestsSpec, InstructionsSpec
from align.verifiers.spec_models import (
    BackwardLikelihoodSpec,
    ClassifierSpec,
    JudgeSpec,
    MetaRankingSpec,
    SequenceLikelihoodSpec,
)


class AnswerSpec(VerifierBlock):
    """The final answer against the reference answer of the prompt (binary)."""

    output = "binary"
    kind: Literal["answer"]
    match: Literal["exact", "math"] = "exact"
    """Equal as text, or mathematically equal by math-verify."""
    extract: Literal["last_number", "boxed", "whole", "pattern"] = "last_number"
    """Which part of the response is the answer."""
    pattern: str | None = None
    """Regular expression whose first group is the answer, for `extract: pattern`."""

    @model_validator(mode="after")
    def _pattern_given(self) -> AnswerSpec:
        if (self.extract == "pattern") != (self.pattern is not None):
            raise ValueError("pattern: goes with `extract: pattern`, and only with it")
        if self.pattern is not None and compile_pattern(self.pattern).groups == 0:
            raise ValueError("pattern: has no group; put parentheses around the part that is the answer")
        return self


class ArithmeticSpec(VerifierBlock):
    """A consistency check on `a+b=`, `a-b=` or `a*b=` that does not work the problem out (binary)."""

    output = "binary"
    kind: Literal["arithmetic"]
    check: Literal["nines", "last_digit", "parity", "magnitude", "first_digit", "no_carry"]
    """Casting out nines, the last digit, odd or even, number of digits and rough size, the first digit by rounding, or
    the sum with every carry forgotten."""


class FormatSpec(VerifierBlock):
    """A regular expression on the response (binary)."""

    output = "binary"
    kind: Literal["format"]
    pattern: str
    """The expression."""
    where: Literal["whole", "anywhere"] = "whole"
    """Must match the whole response, or anywhere in it."""

    @model_validator(mode="after")
    def _compiles(self) -> FormatSpec:
        compile_pattern(self.pattern)
        return self


class LengthSpec(VerifierBlock):
    """Length within bounds (binary)."""

    output = "binary"
    kind: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted."""
    minimum: Annotated[int, Field(ge=0)] = 0
    """Shortest length that passes."""
    maximum: Annotated[int, Field(ge=0)] | None = None
    """Longest length that passes."""

    @model_validator(mode="after")
    def _ordered(self) -> LengthSpec:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError("maximum: is below `minimum`")
        return self


class RepetitionSpec(VerifierBlock):
    """Share of n-grams of words that are not a repeat of an earlier one (score, 1 is best)."""

    output = "score"
    kind: Literal["repetition"]
    n: Annotated[int, Field(ge=1)] = 4
    """Length of the n-grams."""


class LexiconSpec(VerifierBlock):
    """Mean valence per word by a list of words (score)."""

    output = "score"
    kind: Literal["lexicon"]
    file: str
    """The list: `word<TAB>value` lines, pattern XML, or one word per line; may be gzipped."""
    negative_file: str | None = None
    """A second list of one word per line that counts -1; the first then counts +1."""


class VocabularySpec(VerifierBlock):
    """Share of words that stand in a dictionary (score)."""

    output = "score"
    kind: Literal["vocabulary"]
    file: str
    """The dictionary: the first field of each line is a word; may be gzipped."""


class ReadabilitySpec(VerifierBlock):
    """How easy the text reads (score)."""

    output = "score"
    kind: Literal["readability"]
    formula: Literal["flesch", "dale_chall", "sentence_length"] = "flesch"
    """Flesch reading ease, Dale-Chall with `file` as the list of easy words (negated: easier is larger), or mean words
    per sentence (negated)."""
    file: str | None = None
    """List of easy words for `dale_chall`."""

    @model_validator(mode="after")
    def _list_given(self) -> ReadabilitySpec:
        if (self.formula == "dale_chall") != (self.file is not None):
            raise ValueError("file: goes with `formula: dale_chall`, and only with it")
        return self


class SelfConsistencySpec(VerifierBlock):
    """Share of the prompt's other responses that give the same answer (score)."""

    output = "score"
    kind: Literal["self_consistency"]
    extract: Literal["last_number", "boxed", "whole"] = "last_number"
    """Which part of the response is the answer."""


class NoiseSpec(VerifierBlock):
    """A coin per response, by hash (binary): for studying bad supervision."""

    output = "binary"
    kind: Literal["noise"]
    rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of yes."""


class RewardModelSpec(VerifierBlock):
    """A sequence-classification checkpoint with one label, scored through vLLM pooling (score, raw logit)."""

    output = "score"
    kind: Literal["reward_model"]
    model: str
    """Directory of the checkpoint (safetensors), or its name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    chat_template: bool = False
    """Render question and response with the reward model's own chat template; otherwise the prompt, as the policy gets
    it, and the response are joined."""
    append_eos: bool = False
    """End a joined input with the reward model's end-of-sequence token, as TRL does in training; not for a template."""
    max_tokens: int | None = None
    """Longest input; a longer one gets none, it is never cut."""
    engine: dict[str, Any] = {}
    """Further keyword arguments for `vllm.LLM`."""


VerifierSpec = Annotated[
    AnswerSpec
    | ArithmeticSpec
    | FormatSpec
    | LengthSpec
    | RepetitionSpec
    | LexiconSpec
    | VocabularySpec
    | ReadabilitySpec
    | SelfConsistencySpec
    | NoiseSpec
    | RewardModelSpec
    | JudgeSpec
    | MetaRankingSpec
    | BackwardLikelihoodSpec
    | SequenceLikelihoodSpec
    | ClassifierSpec
    | InstructionsSpec
    | CodeTestsSpec,
    Field(discriminator="kind"),
]
