"""What a recipe names outside itself, looked at before anything heavy starts: models, engine settings, word lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    look = _Look(recipe, download)
    gold = recipe.evaluation.gold
    verifiers = [(spec, f"verifiers.{spec.name}") for spec in recipe.verifiers]
    verifiers += [(gold, "evaluation.gold")] if gold is not None else []
    checks: list[Callable[[], object]] = [
        look.model,
        look.shape,
        look.critic,
        look.labels,
        lambda: check_engine_settings(recipe.sampling.engine, "sampling.engine"),
        *(partial(look.aligned, *named) for named in enumerate(recipe.training.supervised.aligned)),
        *(partial(look.verifier, *named) for named in verifiers),
    ]
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return look.remarks, look.identity


class _Look:
    """Looks at one thing at a time; each raises InputError with its faults, and leaves remarks and hashes behind."""

    def __init__(self, recipe: Recipe, download: bool) -> None:
        self._recipe, self._download = recipe, download
        self.remarks: list[str] = []
        self.identity: dict[str, str] = {}

    def _here(self, model: str) -> bool:
        return self._download or not on_the_hub(model)

    def model(self) -> None:
        """The policy's checkpoint."""
        policy = self._recipe.policy
        if policy.model is not None and self._here(policy.model):
            path = resolve_model(policy.model, policy.revision)
            check_model_dir(path)
            self.identity["model"] = fingerprint(path)

    def shape(self) -> None:
        """A new model's shape, which the sampler must be able to run."""
        made = self._recipe.policy.from_scratch
        if made is not None and made.head_dim % CPU_HEAD_DIM and not uses_gpu():
            raise InputError(
                f"policy.from_scratch.head_dim: vLLM's attention on a CPU takes multiples of {CPU_HEAD_DIM}, "
                f"not {made.head_dim}"
            )

    def critic(self) -> None:
        """The reward model that the critic starts from."""
        settings, key = self._recipe.training.rl.critic, "training.rl.critic.model"
        if settings.model is not None and self._here(settings.model):
            path = resolve_model(settings.model, settings.revision, key=key)
            check_scorer(path, key)
            self.identity[key] = fingerprint(path)

    def labels(self) -> None:
        """The ensemble's file of labels."""
        file = self._recipe.ensemble.labels.file
        if file is not None:
            self.identity[KEY] = hash_file(existing_file(file, KEY)).sha256

    def aligned(self, place: int, directory: str) -> None:
        """One of the aligned models."""
        key = f"training.supervised.aligned.{place}"
        check_model_dir(Path(directory), key=key)
        self.identity[key] = fingerprint(Path(directory))

    def verifier(self, spec: VerifierSpec, where: str) -> None:
        """A verifier's files and checkpoint."""
        if spec.checkpoint is not None and not self._here(spec.checkpoint[0]):
            return
        self.remarks.extend(registry.check(spec, where))
        for key in ("file", "negative_file"):
            if getattr(spec, key, None) is not None:
                self.identity[f"{where}.{key}"] = hash_file(Path(getattr(spec, key))).sha256
        if spec.checkpoint is not None:
            self.identity[f"{where}.model"] = fingerprint(resolve_model(*spec.checkpoint))
