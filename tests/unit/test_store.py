"""The run directory: what counts as committed, what is refused, and what is noticed when files are damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.distributed import Ranks
from align.errors import InputError, RunError
from align.recipe import Recipe
from align.records import Score, Verdict
from align.storage import provenance
from align.store import RunStore, need_bytes

IDENTITY = {"model": "3f", "tokenizer": "9a"}


def recipe(tmp_path: Path, **changes: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "output_dir": str(tmp_path),
            "policy": {"model": "model"},
            "prompts": {"source": "prompts.jsonl"},
            "verifiers": [{"kind": "repetition", "name": "repetition"}],
            **changes,
        }
    )


def opened(tmp_path: Path, **changes: object) -> RunStore:
    return RunStore.open(recipe(tmp_path, **changes), Ranks(), identity=IDENTITY)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with opened(tmp_path) as store:
        yield store


def scores(*names: str) -> list[Score]:
    return [Score(name, "p", 0.5, 0.5, 0.0, 1) for name in names]


def commit_scores(store: RunStore, round_index: int = 0) -> None:
    store.commit_shard(round_index, "scores", 0, scores("a", "b"))
    store.commit_shard(round_index, "scores", 1, scores("c"))
    store.commit_stage(round_index, "scores", 2)


# ---- shards and stages -------------------------------------------------------------------------------------


def test_rows_come_back_in_shard_order(store: RunStore) -> None:
    store.commit_shard(3, "scores", 1, scores("c"))
    assert not store.shard_done(3, "scores", 0) and store.shard_done(3, "scores", 1)
    store.commit_shard(3, "scores", 0, scores("a", "b"))
    assert not store.stage_done(3, "scores")
    store.commit_stage(3, "scores", 2)
    assert store.stage_done(3, "scores") and not store.stage_done(2, "scores")
    assert store.read(3, "scores") == scores("a", "b", "c")
    assert store.duplicates == {(3, "scores"): 0}


def test_a_row_that_comes_twice_is_read_once_and_counted(store: RunStore) -> None:
    twice = Verdict("a", "nines", 1.0, None)
    store.commit_shard(0, "verdicts", 0, [twice, Verdict("a", "parity", 0.0, None), twice])
    store.commit_shard(0, "verdicts", 1, [twice])
    store.commit_stage(0, "verdicts", 2)
    assert [v.verifier for v in store.read(0, "verdicts")] == ["nines", "parity"]
    assert store.duplicates[0, "verdicts"] == 2


def test_a_stage_may_be_empty(store: RunStore) -> None:
    store.commit_shard(0, "pairs", 0, [])
    store.commit_stage(0, "pairs", 1)
    store.commit_stage(0, "gold", 0)
    assert store.read(0, "pairs") == [] and store.read(0, "gold") == []


def test_nothing_committed_is_overwritten(store: RunStore) -> None:
    commit_scores(store)
    store.commit_shard(0, "scores", 0, scores("a", "b"))  # the same rows again are no change
    with pytest.raises(ValueError, match=r"scores-00000.parquet is committed already and holds other rows"):
        store.commit_shard(0, "scores", 0, scores("z"))
    with pytest.raises(ValueError, match="scores is committed already"):
        store.commit_stage(0, "scores", 2)
    with store.commit_directory("export") as path:
        (path / "weights").write_text("1")
    with pytest.raises(ValueError, match="export is committed already"):
        with store.commit_directory("export"):
            raise AssertionError("the body must not run")
    store.commit_json(0, "evaluation", {"accuracy": 0.5})
    store.commit_json(0, "evaluation", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="says something else"):
        store.commit_json(0, "evaluation", {"accuracy": 0.6})
    assert store.read(0, "scores") == scores("a", "b", "c")


def test_a_stage_needs_all_its_shards(store: RunStore) -> None:
    store.commit_shard(0, "scores", 0, scores("a"))
    with pytest.raises(RunError, match="scores-00001.parquet: shard 1 of 2 is not committed"):
        store.commit_stage(0, "scores", 2)
    store.commit_shard(0, "scores", 2, scores("c"))
    with pytest.raises(RunError, match=r"scores-00002.parquet: not in the manifest"):
        store.commit_stage(0, "scores", 1)


def test_unknown_stages_and_wrong_rows_are_bugs(store: RunStore) -> None:
    with pytest.raises(ValueError, match="no stage 'sample'; there are samples, comparisons, verdicts"):
        store.stage_done(0, "sample")
    with pytest.raises(ValueError, match=r"scores-00000.parquet: row 0 is a Verdict, not a Score"):
        store.commit_shard(0, "scores", 0, [Verdict("a", "v", 1.0, None)])
    with pytest.raises(ValueError, match="scores is not committed"):
        store.read(0, "scores")


@pytest.mark.parametrize("name", ["../x", "a/../../b", "", ".hidden", "a b", "x" * 65, "a\x00", "/etc", "é"])
def test_names_cannot_lead_out_of_the_directory(name: str, store: RunStore) -> None:
    with pytest.raises(ValueError, match="cannot name a part of a run"):
        store.verify_directory(name)
    with pytest.raises(ValueError, match="cannot name a part of a run"):
        store.commit_json(None, name, {})


def test_links_are_not_followed(store: RunStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / "export").symlink_to(outside)
    with pytest.raises(RunError, match="export: is a symbolic link"):
        store.verify_directory("export")
    with pytest.raises(RunError, match="weights: is a symbolic link"):
        with store.commit_directory("model") as path:
            (path / "weights").symlink_to("/etc/hostname")
    assert not (store.root / "model").exists() and list(outside.iterdir()) == []


# ---- damage ------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "edited": lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"7").replace(b"0", b"2")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_noticed_and_named(damage: str, store: RunStore) -> None:
    commit_scores(store)
    path = store.root / "rounds/00000/scores-00001.parquet"
    DAMAGE[damage](path)
    with pytest.raises(RunError) as caught:
        store.read(0, "scores")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "expected " in message and "sha256" in message
    assert f"delete {path.parent} and start the run again" in message


def test_swapped_and_extra_shards_are_noticed(store: RunStore) -> None:
    commit_scores(store)
    one, two = (store.root / f"rounds/00000/scores-0000{i}.parquet" for i in (0, 1))
    one.rename(one.with_suffix(".x"))
    two.rename(one)
    one.with_suffix(".x").rename(two)
    with pytest.raises(RunError, match=r"scores-00000.parquet: damaged: expected"):
        store.read(0, "scores")
    one.rename(one.with_suffix(".x"))
    two.rename(one)
    one.with_suffix(".x").rename(two)
    shutil.copy(one, one.with_name("scores-00002.parquet"))
    with pytest.raises(RunError, match=r"scores-00002.parquet: not in the manifest of its round"):
        store.read(0, "scores")


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_damaged_before_its_stage_is_made_again(damage: str, suffix: str, store: RunStore) -> None:
    store.commit_shard(0, "scores", 0, scores("a", "b"))
    DAMAGE[damage](store.root / f"rounds/00000/scores-00000{suffix}")
    assert not store.shard_done(0, "scores", 0)
    with pytest.raises(RunError, match="scores-00000"):
        store.commit_stage(0, "scores", 1)
    store.commit_shard(0, "scores", 0, scores("a", "b"))
    store.commit_stage(0, "scores", 1)
    assert store.read(0, "scores") == scores("a", "b")


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "missing"])
@pytest.mark.parametrize("file", ["rounds/00000/manifest.json", "rounds/00000/evaluation.json", "run.json"])
def test_a_damaged_ledger_is_noticed(file: str, damage: str, store: RunStore, tmp_path: Path) -> None:
    commit_scores(store)
    store.commit_json(0, "evaluation", {"accuracy": {"value": 0.51, "low": 0.4, "high": 0.61}})
    store.close()
    DAMAGE[damage](store.root / file)
    with pytest.raises(RunError, match=file.replace(".", r"\.")):
        with opened(tmp_path) as again:
            again.read(0, "scores")
            again.read_json(0, "evaluation")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["weights", "nested/part", "manifest.json"])
def test_a_damaged_directory_is_noticed(file: str, damage: str, store: RunStore, tmp_path: Path) -> None:
    commit_export(store)
    assert store.verify_directory("export") == store.root / "export"
    store.close()
    DAMAGE[damage](store.root / "export" / file)
    with opened(tmp_path) as again:
        with pytest.raises(RunError, match=rf"export/{file}: [\s\S]*Delete .*export and start the run again"):
            again.verify_directory("export")
        with again.commit_directory("export") as path:
            (path / "weights").write_text("new")
        assert "was damaged and is made again" in again.notices[0]
        assert (again.root / "export" / "weights").read_text() == "new"


def test_an_extra_file_in_a_directory_is_noticed(store: RunStore, tmp_path: Path) -> None:
    commit_export(store)
    store.close()
    (store.root / "export" / "custom_code.py").write_text("print()")
    with opened(tmp_path) as again, pytest.raises(RunError, match=r"custom_code.py: not in the manifest"):
        again.verify_directory("export")


def commit_export(store: RunStore) -> None:
    with store.commit_directory("export") as path:
        (path / "weights").write_text("0123456789")
        (path / "nested").mkdir()
        (path / "nested" / "part").write_text("10")


# ---- checkpoints -------------------------------------------------------------------------------------------


def save(store: RunStore, version: int, text: str = "w") -> None:
    with store.commit_checkpoint(version) as path:
        (path / "weights").write_text(f"{text}{version}")


def names(store: RunStore) -> list[str]:
    return sorted(path.name for path in (store.root / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(store: RunStore, tmp_path: Path) -> None:
    assert store.latest_checkpoint() is None
    for version in (1, 2, 3):
        save(store, version)
        assert store.latest_checkpoint() == version
    assert names(store) == ["00002", "00003", "LATEST"]
    assert (store.root / "checkpoints/LATEST").read_text() == "00003\n"
    store.close()
    with opened(tmp_path) as again:
        assert again.latest_checkpoint() == 3
        assert (again.verify_checkpoint(3) / "weights").read_text() == "w3"
        with pytest.raises(RunError, match="no checkpoint 1"):
            again.verify_checkpoint(1)


def test_a_failed_body_leaves_nothing(store: RunStore) -> None:
    save(store, 1)
    with pytest.raises(KeyError), store.commit_checkpoint(2) as path:
        (path / "weights").write_text("half")
        raise KeyError("loss")
    assert store.latest_checkpoint() == 1 and names(store) == ["00001", "LATEST"]


def test_a_commit_that_latest_does_not_name_yet_counts(store: RunStore, tmp_path: Path) -> None:
    save(store, 1)
    save(store, 2)
    (store.root / "checkpoints/LATEST").write_text("00001\n")
    store.close()
    with opened(tmp_path) as again:
        assert again.latest_checkpoint() == 2 and again.notices == []
        assert (again.root / "checkpoints/LATEST").read_text() == "00002\n"


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_notice_and_replaced(store: RunStore, tmp_path: Path) -> None:
    save(store, 1)
    save(store, 2)
    store.close()
    flip(store.root / "checkpoints/00002/weights")
    with opened(tmp_path) as again:
        assert again.latest_checkpoint() == 1
        assert "passed over" in again.notices[0] and "00002/weights: damaged" in again.notices[0]
        with pytest.raises(RunError, match="00002/weights: damaged"):
            again.verify_checkpoint(2)
        save(again, 2, "anew")
        assert (again.verify_checkpoint(2) / "weights").read_text() == "anew2"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(store: RunStore, tmp_path: Path) -> None:
    save(store, 1)
    store.close()
    flip(store.root / "checkpoints/00001/weights")
    with pytest.raises(RunError, match=r"00001/weights: damaged[\s\S]*No checkpoint .* is sound"):
        opened(tmp_path)
    shutil.rmtree(store.root / "checkpoints")
    opened(tmp_path).close()


def test_old_checkpoints_stay_where_the_new_one_cannot_be_read_back(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk says that it wrote, and gives back something else."""
    save(store, 1)
    save(store, 2)
    real = store._point_latest

    def and_damage(version: int) -> None:
        real(version)
        flip(store.root / f"checkpoints/{version:05d}/weights")

    monkeypatch.setattr(store, "_point_latest", and_damage)
    with pytest.raises(RunError, match="The disk did not keep what was written; older checkpoints are kept"):
        save(store, 3)
    assert names(store) == ["00001", "00002", "00003", "LATEST"] and store.latest_checkpoint() == 2


# ---- who may open ------------------------------------------------------------------------------------------


def test_another_recipe_is_refused_with_the_difference(store: RunStore, tmp_path: Path) -> None:
    (store.root / "rounds").mkdir()
    store.close()
    with pytest.raises(InputError) as caught:
        opened(tmp_path, seed=1, training={"learning_rate": 1e-5})
    message = str(caught.value)
    assert "training.learning_rate: 1e-06 -> 1e-05" in message and "seed: 0 -> 1" in message
    assert "change `name`" in message


def test_a_recipe_mended_before_anything_was_made_begins_again(store: RunStore, tmp_path: Path) -> None:
    """A wrong prompt column is found after the run was begun; the name must not be lost to it."""
    store.pin("prompts", {"digest": "old"})
    store.close()
    with opened(tmp_path, seed=1) as again:
        assert again.read_json(None, "prompts") is None
        assert "seed: 1" in (again.root / "recipe.yaml").read_text()


def test_other_inputs_are_refused_with_the_difference(store: RunStore, tmp_path: Path) -> None:
    (store.root / "checkpoints").mkdir()
    store.close()
    with pytest.raises(InputError, match=r"another input:\n  tokenizer: 9a -> 9b\nRestore"):
        RunStore.open(recipe(tmp_path), Ranks(), identity={**IDENTITY, "tokenizer": "9b"})
    with pytest.raises(InputError, match="tokenizer: 9a -> absent"):
        RunStore.open(recipe(tmp_path), Ranks(), identity={"model": "3f"})


def test_a_pinned_input_may_not_change(store: RunStore) -> None:
    store.pin("prompts", {"digest": "5e", "train": 90})
    store.pin("prompts", {"digest": "5e", "train": 90})
    assert store.read_json(None, "prompts") == {"digest": "5e", "train": 90}
    with pytest.raises(InputError, match=r"another input \(prompts\):\n  digest: 5e -> 77\n"):
        store.pin("prompts", {"digest": "77", "train": 90})


def test_a_run_may_be_moved(store: RunStore, tmp_path: Path) -> None:
    commit_scores(store)
    store.close()
    shutil.move(tmp_path / "small", tmp_path / "elsewhere" / "small")
    with opened(tmp_path / "elsewhere") as again:
        assert len(again.read(0, "scores")) == 3


def test_a_changed_environment_is_noticed_once(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    before = provenance.environment()
    after = {**before, "packages": {**before["packages"], "torch": "99.0"}}
    monkeypatch.setattr(provenance, "environment", lambda: after)
    with opened(tmp_path) as again:
        assert again.notices == [f"since the run began, torch: {before['packages']['torch']} -> 99.0"]
    with opened(tmp_path) as again:
        assert again.notices == []
    kept = json.loads((store.root / "environment.json").read_text())["environments"]
    assert kept == [before, after]


def test_the_environment_holds_no_secrets(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (store.root / "environment.json").read_text()
    assert set(json.loads(text)["environments"][0]) == {"python", "platform", "cpus", "packages"}
    assert os.uname().nodename not in json.loads(text)["environments"][0]["platform"].split()
    for value in (os.environ.get("HOME"), os.environ.get("PATH")):
        assert value is None or value not in text


def test_a_directory_in_use_is_refused(store: RunStore, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on .*change `name` or `output_dir`"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_a_forked_child_does_not_hold_the_lock(store: RunStore, tmp_path: Path) -> None:
    """A verifier process that outlives a killed run must not lock the user out."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    store.close()
    try:
        opened(tmp_path).close()
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_lock_file_without_an_owner_is_no_lock(store: RunStore, tmp_path: Path) -> None:
    store.close()
    for text in ("", "garbage", '{"pid": 1, "host": "elsewhere"}'):
        (store.root / "lock").write_text(text)
        opened(tmp_path).close()


def test_a_run_that_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such run; start it with `align run`"):
        RunStore.open(recipe(tmp_path), Ranks(), identity={}, allow_new=False)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds 'thesis.tex' but no run"):
        opened(tmp_path)
    assert (tmp_path / "small" / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(tmp_path / "small")
    (tmp_path / "small").write_text("a file")
    with pytest.raises(InputError, match="small: is not a directory"):
        opened(tmp_path)


def test_leftovers_are_removed_and_committed_files_are_not(store: RunStore, tmp_path: Path) -> None:
    commit_scores(store)
    with store.commit_directory("model") as path:
        (path / ".tmp-belongs-to-the-model").write_text("1")
    leftovers = [".tmp-0-summary.json", "rounds/00000/.tmp-0-x", "rounds/.tmp-x", ".tmp-export/deep/file"]
    for name in leftovers:
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("half")
    store.close()
    with opened(tmp_path) as again:
        assert [p.name for p in again.root.rglob(".tmp-*")] == [".tmp-belongs-to-the-model"]
        assert again.verify_directory("model") is not None and len(again.read(0, "scores")) == 3


# ---- small files -------------------------------------------------------------------------------------------


def test_summary_and_finish(store: RunStore, tmp_path: Path) -> None:
    assert not store.finished
    store.write_summary({"status": "running", "seconds": {"total": 1.5}})
    store.write_summary({"status": "done", "seconds": {"total": float("nan")}})
    assert store.finished
    assert json.loads((store.root / "summary.json").read_text()) == {"status": "done", "seconds": {"total": None}}
    with pytest.raises(ValueError, match="'finished' is none of"):
        store.write_summary({"status": "finished"})
    with pytest.raises(ValueError, match=r"run.json is the store's own"):
        store.commit_json(None, "run", {})
    with pytest.raises(ValueError, match=r"manifest.json is the store's own"):
        store.commit_json(0, "manifest", {})


def test_a_report_that_the_manifest_does_not_list_is_not_there(store: RunStore) -> None:
    """Killed between the report and the manifest, it is written again."""
    store.commit_json(0, "evaluation", {"accuracy": 0.5})
    (store.root / "rounds/00000/pairing.json").write_text('{"counts": 9}')
    assert store.read_json(0, "pairing") is None and store.read_json(1, "evaluation") is None
    store.commit_json(0, "pairing", {"counts": 1})
    assert store.read_json(0, "pairing") == {"counts": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_broken_summary_is_named(text: str, store: RunStore) -> None:
    (store.root / "summary.json").write_text(text)
    with pytest.raises(RunError, match=r"summary.json: damaged: not"):
        _ = store.finished


def test_metrics_are_cut_back_to_the_checkpoint(store: RunStore) -> None:
    for step in range(1, 6):
        store.append_metrics({"step": step, "loss": 1 / step, "nan": float("inf")})
    assert store.truncate_metrics(3) == (3, 2, 0)
    assert [line["step"] for line in store.read_metrics()] == [1, 2, 3]
    assert store.read_metrics()[0] == {"step": 1, "loss": 1.0, "nan": None}
    assert store.truncate_metrics(3) == (3, 0, 0)
    with pytest.raises(ValueError, match="needs an integer `step`"):
        store.append_metrics({"loss": 1.0})


def test_a_torn_line_spoils_no_other_and_is_counted(store: RunStore, tmp_path: Path) -> None:
    store.append_metrics({"step": 1})
    store.append_metrics({"step": 2})
    store.close()
    path = store.root / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0")
    with opened(tmp_path) as again:
        again.append_metrics({"step": 2})
        assert [line["step"] for line in again.read_metrics()] == [1, 2]
        assert again.truncate_metrics(9) == (2, 0, 1)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_room_is_looked_for_before_a_write(tmp_path: Path) -> None:
    need_bytes(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(RunError, match=r"needs 1,000,000,000,000,000,000 bytes and [\d,]+ are free"):
        need_bytes(tmp_path, 10**18)


def test_opening_a_store_imports_nothing_heavy() -> None:
    code = "import sys, align.store; print(sorted({'torch', 'vllm', 'transformers', 'pandas'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
