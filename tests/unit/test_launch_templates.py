"""Launch templates: they parse, they call a command line that exists, and they open nothing that need not be open."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from align.cli import app
from align.recipe_training import Training
from align.training.deepspeed_config import deepspeed_config

LAUNCH = Path(__file__).parents[2] / "launch"
TEMPLATES = sorted(path for path in LAUNCH.iterdir() if path.name != "README.md")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def text(name: str) -> str:
    return (LAUNCH / name).read_text(encoding="utf-8")


def align_calls(content: str) -> Iterator[list[str]]:
    """The words after `align` or `-m align.cli` of every call in a text, comments and fenced blocks too."""
    for line in content.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:\balign|-m align\.cli)\s+((?:run|plan)\b[^`#\n]*)", line):
            yield shlex.split(found[1].rstrip(" .,;:"))


def check_call(words: list[str]) -> None:
    verb, *arguments = words
    assert verb in COMMANDS, f"`align {verb}` does not exist"
    options = {flag for parameter in COMMANDS[verb].params for flag in parameter.opts if flag.startswith("--")}
    for word in arguments:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"`align {verb}` has no {word}"


def test_every_template_is_described() -> None:
    described = set(re.findall(r"^\| `([\w.]+)` \|", text("README.md"), re.MULTILINE))
    assert described == {path.name for path in TEMPLATES}


@pytest.mark.parametrize("name", [path.name for path in (*TEMPLATES, LAUNCH / "README.md")])
def test_the_command_line_that_is_called_exists(name: str) -> None:
    content = text(name)
    if name == "kubernetes.yaml":
        words = yaml.safe_load(content)["spec"]["template"]["spec"]["containers"][0]["command"]
        assert words[0] == "align"
        check_call(words[1:])
        return
    calls = list(align_calls(content))
    assert calls, f"{name} never calls align"
    for words in calls:
        check_call(words)


def test_a_wrong_flag_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="has no --rank"):
        check_call(["run", "x.yaml", "--rank", "2"])
    with pytest.raises(AssertionError, match="does not exist"):
        check_call(["start", "x.yaml"])


def test_slurm_is_a_script_whose_torchrun_flags_exist() -> None:
    content = text("slurm.sbatch")
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=False).returncode == 0
    assert content.startswith("#!/bin/bash\n")
    command = content.replace("\\\n", " ").split("torchrun", 2)[2].strip()
    values = {
        "$SLURM_NNODES": "2",
        "$SLURM_GPUS_ON_NODE": "8",
        "$SLURM_JOB_ID": "7",
        "$MASTER_ADDR:$MASTER_PORT": "a:1",
    }
    for variable, value in values.items():
        assert f'"{variable}"' in command
        command = command.replace(f'"{variable}"', value)
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(shlex.split(command.replace('"$@"', "recipe.yaml seed=1")))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 0)
    assert parsed.module and parsed.training_script == "align.cli"
    assert parsed.training_script_args == ["run", "recipe.yaml", "seed=1"]  # ranks come from torchrun, not from --ranks


def test_slurm_ports_are_unprivileged_and_below_the_ephemeral_range_end() -> None:
    base, span = map(int, re.findall(r"MASTER_PORT=\$\(\((\d+) \+ SLURM_JOB_ID % (\d+)\)\)", text("slurm.sbatch"))[0])
    assert 1024 < base and base + span <= 65_536


def test_kubernetes_runs_one_unprivileged_pod_without_a_port() -> None:
    job = yaml.safe_load(text("kubernetes.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["automountServiceAccountToken"] is False
    command = container["command"]
    assert int(command[command.index("--ranks") + 1]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted, given = {m["name"] for m in container["volumeMounts"]}, {v["name"] for v in pod["volumes"]}
    assert mounted == given


def test_kubernetes_does_not_repeat_a_mistaken_recipe() -> None:
    from align.errors import InputError

    [rule] = yaml.safe_load(text("kubernetes.yaml"))["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [InputError.exit_code]


def test_skypilot_keeps_the_run_outside_the_machine() -> None:
    task = yaml.safe_load(text("skypilot.yaml"))
    assert set(task) == {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert (Path(__file__).parents[2] / task["envs"]["RECIPE"]).is_file()
    assert 'output_dir="$HOME/runs"' in task["run"] and "~/runs" in task["file_mounts"]


def test_ray_only_names_what_stays_behind() -> None:
    assert set(yaml.safe_load(text("ray_job.yaml"))) == {"excludes", "env_vars"}


OPEN = (
    r"0\.0\.0\.0|\[::\]|--host\b|host(Network|Port)|containerPort|\bports:"
    r"|LoadBalancer|NodePort|kind: Service\b|dashboard"
)


@pytest.mark.parametrize("name", [path.name for path in TEMPLATES])
def test_nothing_listens_and_no_secret_is_asked_for(name: str) -> None:
    content = text(name)
    assert re.search(OPEN, content) is None
    assert re.search(r"(?i)password|api_key|secret|hf_token|privileged: true", content) is None


def test_readme_snippets_are_recipe_blocks() -> None:
    content = text("README.md")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", content, re.DOTALL)]
    blocks += [yaml.safe_load(line) for line in re.findall(r"`(training: \{.*?\})`", content)]
    assert len(blocks) == 7
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for block in blocks:
        training = Training.model_validate(block["training"])
        zero = deepspeed_config(training, "bfloat16", 2)["zero_optimization"]
        DeepSpeedZeroConfig.model_validate(zero)  # refuses a key that DeepSpeed does not have
        assert training.deepspeed.get("zero_optimization", {}).items() <= zero.items()
