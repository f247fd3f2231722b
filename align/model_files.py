"""A model directory, looked at before anything heavy loads: found, complete, safetensors, no code of its own.

Only the standard library is needed, so a wrong path is reported in milliseconds.  What is refused here could
otherwise execute code from a download (pickled weights, `auto_map` modules) or fail minutes later inside an engine.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from align.errors import InputError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt")
"""What is fetched of a hub repository: weights, settings and the tokenizer; never Python files or pickles."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HEADER_LIMIT = 100 << 20  # bytes; the safetensors library refuses longer headers
_BLOCK, _BLOCKS = 1 << 20, 64


def resolve_model(model: str, revision: str | None = None, *, key: str = "policy.model") -> Path:
    """The local directory of a model: a path as it is, a hub name downloaded at `revision`.

    `key` is the recipe key that is named where this fails.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if revision is not None:
            raise InputError(f"{key}: {model} is a local directory, so `revision` has no meaning; remove it")
        return local.resolve()
    if local.exists():
        raise InputError(f"{key}: {model} is a file; give the directory that holds config.json and the weights")
    if not on_the_hub(model):
        raise InputError(f"{key}: {model}: no such directory")
    return _download(model, revision, key)


def on_the_hub(model: str) -> bool:
    """Whether this can only be the name of a model on the hub: nothing here is called so, and it looks like one."""
    path = Path(model).expanduser()
    named = not path.is_absolute() and not model.startswith((".", "~")) and _REPOSITORY.fullmatch(model) is not None
    return named and not path.exists()


def _download(model: str, revision: str | None, key: str) -> Path:
    """Fetch a hub repository into the Hugging Face cache; a repository that is there already is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{key}: {model} is no local directory, and the hub did not give it"
            f"{f' at revision {revision}' if revision else ''}: {reason}"
        ) from None


def check_model_dir(path: Path, *, key: str = "policy.model") -> dict[str, Any]:
    """Refuse a directory that cannot be loaded safely and completely; returns its config.json."""
    if not path.is_dir():
        raise InputError(f"{key}: {path}: no such directory")
    config = _read_json(path / "config.json", key, f"{path} has no config.json; is it a Hugging Face model directory?")
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file() and "auto_map" in _read_json(path / name, key, ""):
            raise InputError(
                f"{key}: {path / name} asks for Python code from the repository (auto_map), which is never run; "
                "remove that entry if transformers knows the architecture, or use another model"
            )
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{key}: {path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it beside the weights")
    for file in weight_files(path, key=key):
        _check_safetensors(file, key)
    return config


def weight_files(path: Path, *, key: str = "policy.model") -> list[Path]:
    """The safetensors files of a model directory, all of those its index names."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, key, "").get("weight_map", {}).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing or not names:
            what = f"{missing[0]}, which is not there" if missing else "no file"
            raise InputError(f"{key}: {index} names {what}; copy or download the whole model again")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise InputError(
            f"{key}: {path} holds its weights as a pickle only ({pickles[0]}), which can run code when it is loaded "
            "and is refused; convert it once, in a place you trust, with transformers' `save_pretrained`"
        )
    raise InputError(f"{key}: {path} has no weights: no *.safetensors file")


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a model directory, from the files' headers."""
    return {name for file in weight_files(path) for name in _header(file, "policy.model") if name != "__metadata__"}


def fingerprint(path: Path) -> str:
    """A hash of config, tokenizer and weights: the model's identity in a run directory.

    Of a file over 64 MiB, 64 evenly spaced blocks of 1 MiB and the length are hashed, so that a large model costs
    no more than a second.
    """
    digest = hashlib.sha256()
    small = [path / name for name in (*SETTINGS, *TOKENIZER_FILES)]
    for file in [p for p in small if p.is_file()] + weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for start in _block_starts(size):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _block_starts(size: int) -> list[int]:
    """Offsets of the blocks that are hashed: all of a small file, evenly spaced ones of a large file."""
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    return [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]


def _read_json(file: Path, key: str, absent: str) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{key}: {absent or f'{file} is missing'}")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{key}: {file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{key}: {file} is not a JSON object")
    return value


def _header(file: Path, key: str) -> dict[str, Any]:
    """The JSON header of a safetensors file: name -> {dtype, shape, data_offsets}."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if 0 < length <= _HEADER_LIMIT else b""
    try:
        header = json.loads(raw)
    except ValueError:
        header = None
    if not isinstance(header, dict) or len(raw) < length:
        raise InputError(f"{key}: {file} is not a safetensors file, or is cut short; copy or download it again")
    return header


def _check_safetensors(file: Path, key: str) -> None:
    """Refuse a file whose length is not what its header says."""
    header = _header(file, key)
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    if not tensors:
        raise InputError(f"{key}: {file} holds no tensors")
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    expected = start + max(t["data_offsets"][1] for t in tensors)
    if file.stat().st_size != expected:
        raise InputError(
            f"{key}: {file} is {file.stat().st_size} bytes and should be {expected}; copy or download it again"
        )
