"""Model directories: found, complete, safe; each refusal names the file and the way out."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import InputError
from align.model_files import _block_starts, check_model_dir, fingerprint, resolve_model, tensor_names


def tensors(file: Path, names: tuple[str, ...] = ("a.weight",)) -> None:
    """A safetensors file by hand: eight bytes of header length, JSON, then two float32 numbers per tensor."""
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    raw = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + struct.pack(f"<{2 * len(names)}f", *range(2 * len(names))))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    tensors(tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_directory_passes(model: Path) -> None:
    assert check_model_dir(model) == {"model_type": "llama"}
    assert tensor_names(model) == {"a.weight"}
    assert resolve_model(str(model)) == model.resolve()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    what = {"config.json": "no config.json", "tokenizer.json": "no tokenizer", "model.safetensors": "no weights"}[name]
    with pytest.raises(InputError, match=f"policy.model: .*has {what}"):
        check_model_dir(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_and_never_opened(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / name)  # opening it to read would wait for ever
    with pytest.raises(InputError, match=rf"pickle only \({name}\).*save_pretrained"):
        check_model_dir(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_from_a_repository_is_refused(model: Path, name: str) -> None:
    (model / name).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(InputError, match=rf"{name} asks for Python code from the repository \(auto_map\)"):
        check_model_dir(model)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is not"):
        check_model_dir(model, key="verifiers.rm.model")


def test_cut_and_foreign_weights_are_refused(model: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for wrong, message in (
        (whole[:-1], r"is \d+ bytes and should be"),
        (whole + b"x", r"is \d+ bytes and should be"),
        (whole[:20], "not a safetensors file, or is cut short"),
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not a safetensors file"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(InputError, match=message):
            check_model_dir(model)
    tensors(file, ())
    with pytest.raises(InputError, match="holds no tensors"):
        check_model_dir(model)


def test_every_shard_of_an_index_must_be_there(model: Path) -> None:
    (model / "model.safetensors").unlink()
    tensors(model / "one.safetensors", ("a",))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json names two\.safetensors, which is not there"):
        check_model_dir(model)
    tensors(model / "two.safetensors", ("b",))
    check_model_dir(model)
    assert tensor_names(model) == {"a", "b"}


def test_a_fingerprint_sees_weights_config_and_tokenizer(model: Path) -> None:
    first = fingerprint(model)
    assert fingerprint(model) == first
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert fingerprint(model) != first, name
        (model / name).write_bytes(kept)
    (model / "README.md").write_text("words")
    assert fingerprint(model) == first


def test_blocks_cover_a_small_file_and_both_ends_of_a_large_one() -> None:
    mib = 1 << 20
    assert _block_starts(0) == []
    assert _block_starts(2 * mib + 1) == [0, mib, 2 * mib]
    starts = _block_starts(1000 * mib)
    assert len(starts) == 64 and starts[0] == 0 and starts[-1] == 999 * mib


def test_names_that_are_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./absent", "/absent/model", "~/absent-model", "a/b/c", "a//b", "with space", f"{tmp_path}/absent"):
        with pytest.raises(InputError, match=r"policy\.model: .*no such directory"):
            resolve_model(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "file"))
    with pytest.raises(InputError, match="local directory, so `revision` has no meaning"):
        resolve_model(str(tmp_path), "main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"key\.model: org/absent-model is no local .*at revision abc"):
        resolve_model("org/absent-model", "abc", key="key.model")


def test_no_torch_is_needed() -> None:
    code = "import sys, align.model_files, align.verifiers.reward_model as r; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
