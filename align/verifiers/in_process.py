"""Builds the verifiers that run in the training process, each beside the module that does its work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from align.verifiers.base import ModelVerifier
from align.verifiers.spec import (
    BackwardLikelihoodSpec,
    ClassifierSpec,
    JudgeSpec,
    MetaRankingSpec,
    RewardModelSpec,
    SequenceLikelihoodSpec,
    VerifierSpec,
)


def build(spec: VerifierSpec, dtype: str, policy_dir: Callable[[], Path]) -> ModelVerifier:
    """The verifier with its engine started; `policy_dir` gives the directory of the policy before training."""
    if isinstance(spec, RewardModelSpec):
        from align.verifiers.reward_model import RewardModel

        return RewardModel(spec, dtype=dtype)
    if isinstance(spec, ClassifierSpec):
        from align.verifiers.classifier import Classifier

        return Classifier(spec, dtype=dtype)
    if isinstance(spec, BackwardLikelihoodSpec | SequenceLikelihoodSpec):
        from align.verifiers.likelihood import Likelihood

        return Likelihood(spec, dtype, policy_dir)
    if isinstance(spec, JudgeSpec):
        from align.verifiers.judge import LanguageJudge

        return LanguageJudge.start(spec, dtype)
    if isinstance(spec, MetaRankingSpec):
        from align.verifiers.meta_ranking import MetaRanking

        return MetaRanking.start(spec, dtype)
    raise ValueError(f"verifier {spec.name!r}: kind {spec.kind!r} does not run in this process")


def check(spec: VerifierSpec, where: str) -> None:
    """Refuse what cannot start, without loading anything heavy; `where` is the recipe key of the block."""
    from align.model_files import check_model_dir, resolve_model
    from align.sampling.environment import check_engine_settings

    check_engine_settings(getattr(spec, "engine", {}), f"{where}.engine")
    if isinstance(spec, ClassifierSpec):
        from align.verifiers.classifier import check as check_classifier

        check_classifier(spec, where)
    elif isinstance(spec, BackwardLikelihoodSpec | SequenceLikelihoodSpec):
        if spec.model is not None:
            check_model_dir(resolve_model(spec.model, spec.revision, key=f"{where}.model"), key=f"{where}.model")
    elif isinstance(spec, JudgeSpec | MetaRankingSpec):
        from align.verifiers.answering import check as check_answering

        check_answering(spec, where)
        if isinstance(spec, MetaRankingSpec):
            from align.verifiers.meta_ranking import read_references

            read_references(spec.file, where)
