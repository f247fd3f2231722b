"""Which class stands behind each `kind` of a recipe, and what is checked of a verifier before a run starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

from align.errors import InputError
from align.verifiers.answers import Answer
from align.verifiers.arithmetic import Arithmetic
from align.verifiers.base import Verifier
from align.verifiers.code_tests import CodeTests
from align.verifiers.consistency import SelfConsistency
from align.verifiers.form import Format, Length, Repetition
from align.verifiers.instructions import Instructions
from align.verifiers.lexicon import Lexicon, Vocabulary
from align.verifiers.noise import Noise
from align.verifiers.readability import Readability
from align.verifiers.spec import AnswerSpec, CodeTestsSpec, JudgeSpec, RewardModelSpec, VerifierSpec
from align.verifiers.wordlists import read_valences, read_vocabulary

KINDS: dict[str, type[Verifier]] = {
    "answer": Answer,
    "arithmetic": Arithmetic,
    "format": Format,
    "length": Length,
    "repetition": Repetition,
    "lexicon": Lexicon,
    "vocabulary": Vocabulary,
    "readability": Readability,
    "self_consistency": SelfConsistency,
    "noise": Noise,
    "instructions": Instructions,
    "code_tests": CodeTests,
}
"""Verifiers that run in the killable process."""

IN_PROCESS = ("reward_model", "judge", "meta_ranking", "backward_likelihood", "sequence_likelihood", "classifier")
"""Kinds that run in the training process because they need its accelerator, or ask a server in many threads; whoever
starts the run builds them (`align.verifiers.in_process`)."""


WORD_LISTS = ("lexicon", "vocabulary", "readability")
"""Kinds whose files are lists of words."""

REMARKABLE = 0.1  # a word list of which more than this share can match nothing is worth a word


def build(spec: VerifierSpec) -> Verifier:
    """The verifier that a recipe block describes, with its files read."""
    if spec.kind not in KINDS:
        raise ValueError(f"verifier {spec.name!r}: kind {spec.kind!r} is built by the run, beside its engines")
    return KINDS[spec.kind].from_spec(spec)


def kind_of(spec: VerifierSpec) -> Literal["binary", "score"]:
    """What the verifier answers with; known without building it."""
    return spec.output


def sees_whole_prompts(spec: VerifierSpec) -> bool:
    """Whether a verdict depends on the prompt's other responses; known without building the verifier."""
    if spec.kind in KINDS:
        return KINDS[spec.kind].whole_prompts
    return isinstance(spec, JudgeSpec) and spec.mode == "pairwise"


def check(spec: VerifierSpec, where: str | None = None) -> Sequence[str]:
    """Refuse a verifier that cannot start, naming file and key; returns remarks that the user should see.

    `where` is the recipe key of the block, by default `verifiers.<name>`.
    """
    prefix = where if where is not None else f"verifiers.{spec.name}"
    if spec.kind in IN_PROCESS and spec.workers > 1:
        raise InputError(f"{prefix}.workers: `{spec.kind}` runs beside the policy, not in processes of its own")
    asked_here = spec.kind in IN_PROCESS and getattr(spec, "endpoint", None) is None
    if asked_here and spec.timeout_s != type(spec).model_fields["timeout_s"].default:
        raise InputError(
            f"{prefix}.timeout_s: a model in this process answers a whole batch at once, so there is no deadline for "
            "one response; leave it out"
        )
    remarks = []
    for key in ("file", "negative_file") if spec.kind in WORD_LISTS else ():
        path = getattr(spec, key, None)
        if path is None:
            continue
        read = read_valences if spec.kind == "lexicon" else read_vocabulary
        try:
            found = read(path)
        except InputError as error:
            raise InputError(f"{prefix}.{key}: {error}") from None
        if found.unmatched > REMARKABLE * found.entries:
            remarks.append(
                f"{prefix}.{key}: {path}: {found.unmatched} of {found.entries} entries are not single words "
                "(phrases, smileys) and can match nothing"
            )
    if isinstance(spec, CodeTestsSpec):
        from align.verifiers.sandbox import check_available

        check_available(prefix)
    if spec.kind in IN_PROCESS and not isinstance(spec, RewardModelSpec):
        from align.verifiers.in_process import check as check_model

        check_model(spec, prefix)
    if isinstance(spec, RewardModelSpec):
        from align.verifiers.reward_model import check as check_reward_model

        check_reward_model(spec, prefix)
    if isinstance(spec, AnswerSpec) and spec.match == "math" and importlib.util.find_spec("math_verify") is None:
        raise InputError(f"{prefix}.match: `math` needs the package math-verify; install it or use `match: exact`")
    return remarks
