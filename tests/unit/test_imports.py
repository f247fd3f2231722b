"""What may be imported by what: the light modules must not need the heavy packages, not even installed ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "deepspeed", "trl", "peft", "transformers", "datasets", "accelerate", "matplotlib")
LIGHT = (
    "align", "align.cli", "align.errors", "align.recipe", "align.recipe_file", "align.launcher", "align.worker",
    "align.doctor", "align.progress", "align.records", "align.store", "align.distributed", "align.loop", "align.pairs",
    "align.prompts", "align.plan", "align.model_card", "align.verify", "align.resampling",
)  # fmt: skip
FOLDERS = ("verifiers", "ensemble", "evaluation", "tasks", "verifying")
MAY_BE_HEAVY = ("align.verifiers.reward_model",)


def light_modules() -> list[str]:
    inside = [
        f"align.{folder}.{file.stem}".removesuffix(".__init__")
        for folder in FOLDERS
        for file in sorted((ROOT / "align" / folder).glob("*.py"))
    ]
    return [name for name in (*LIGHT, *inside) if name not in MAY_BE_HEAVY]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_light_modules_import_where_the_heavy_packages_are_blocked() -> None:
    code = f"""
import importlib, sys
for name in {HEAVY}:
    sys.modules[name] = None  # import now raises
for name in {light_modules()}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_align_pulls_only_the_standard_library() -> None:
    done = run(
        "import sys; before = set(sys.modules); import align\n"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names - {'align'})"
    )
    assert done.stdout == "set()\n", done.stderr
