"""What a recipe names outside itself, looked at before anything heavy starts: models, engine settings, word lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from align.errors import InputError
from align.labels import KEY
from align.launcher import uses_gpu
from align.model_files import check_model_dir, fingerprint, on_the_hub, resolve_model
from align.prompt_sources import existing_file
from align.recipe import Recipe
from align.sampling.environment import check_engine_settings
from align.storage.durable import hash_file
from align.verifiers import registry
from align.verifiers.reward_model import check_scorer
from align.verifiers.spec import VerifierSpec

CPU_HEAD_DIM = 32


def check_inputs(recipe: Recipe, *, download: bool = True) -> tuple[list[str], dict[str, str]]:
    """What the recipe names outside itself: remarks for the user, and hashes that a resumed run must find again.

    Without `download` models on the hub are passed over: a plan wants their config.json only, and reads it itself.
    Raises InputError with every fault at once: model directory, engine settings, the files of every verifier.
    """
    remarks: list[str] = []
    identity: dict[str, str] = {}
    faults: list[str] = []
    policy, gold = recipe.policy, recipe.evaluation.gold

    def here(model: str) -> bool:
        return download or not on_the_hub(model)

    def model() -> None:
        if policy.model is not None and here(policy.model):
            path = resolve_model(policy.model, policy.revision)
            check_model_dir(path)
            identity["model"] = fingerprint(path)

    def verifier(spec: VerifierSpec, where: str) -> None:
        if spec.checkpoint is not None and not here(spec.checkpoint[0]):
            return
        remarks.extend(registry.check(spec, where))
        for key in ("file", "negative_file"):
            if getattr(spec, key, None) is not None:
                identity[f"{where}.{key}"] = hash_file(Path(getattr(spec, key))).sha256
        if spec.checkpoint is not None:
            identity[f"{where}.model"] = fingerprint(resolve_model(*spec.checkpoint))

    def shape() -> None:
        made = policy.from_scratch
        if made is not None and made.head_dim % CPU_HEAD_DIM and not uses_gpu():
            raise InputError(
                f"policy.from_scratch.head_dim: vLLM's attention on a CPU takes multiples of {CPU_HEAD_DIM}, "
                f"not {made.head_dim}"
            )

    def aligned(place: int, directory: str) -> None:
        key = f"training.supervised.aligned.{place}"
        check_model_dir(Path(directory), key=key)
        identity[key] = fingerprint(Path(directory))

    def labels() -> None:
        file = recipe.ensemble.labels.file
        if file is not None:
            identity[KEY] = hash_file(existing_file(file, KEY)).sha256

    def critic() -> None:
        settings = recipe.training.rl.critic
        if settings.model is not None and here(settings.model):
            key = "training.rl.critic.model"
            path = resolve_model(settings.model, settings.revision, key=key)
            check_scorer(path, key)
            identity[key] = fingerprint(path)

    checks: list[Callable[[], object]] = [
        model,
        shape,
        critic,
        labels,
        lambda: check_engine_settings(recipe.sampling.engine, "sampling.engine"),
        *(lambda p=p, d=d: aligned(p, d) for p, d in enumerate(recipe.training.supervised.aligned)),
        *(lambda spec=spec: verifier(spec, f"verifiers.{spec.name}") for spec in recipe.verifiers),
    ]
    if gold is not None:
        checks.append(lambda: verifier(gold, "evaluation.gold"))
    for check in checks:
        try:
            check()
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return remarks, identity
