"""One round's files: shards of records, each with a ledger entry, small reports, and the manifest that lists them.

Order of a shard's commit: rows, flushed, renamed; then its ledger entry, flushed, renamed.  Killed in between, the
shard is pending and is made again under the same name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import RunError
from align.records import Comparison, Pair, PrefixValue, Sample, Score, Verdict
from align.storage import parquet
from align.storage.durable import (
    FileRecord,
    make_directory,
    mismatch,
    os_errors,
    read_document,
    seal,
    to_json,
    unseal,
    write_file,
)

STAGES: dict[str, type[parquet.Record]] = {
    "samples": Sample,
    "comparisons": Comparison,
    "verdicts": Verdict,
    "gold": Verdict,
    "scores": Score,
    "rollouts": Sample,
    "prefix_values": PrefixValue,
    "step_samples": Sample,
    "pairs": Pair,
    "eval_samples": Sample,
    "eval_verdicts": Verdict,
    "eval_gold": Verdict,
    "preflight_samples": Sample,
    "preflight_verdicts": Verdict,
    "label_verdicts": Verdict,
}
_MANIFEST = "manifest.json"


class RoundFiles:
    """The files of one round's directory; knows nothing of ranks or of other rounds."""

    def __init__(self, directory: Path, round_index: int) -> None:
        self.directory = directory
        self._round = round_index

    # ---- shards --------------------------------------------------------------------------------------------

    def shard_done(self, stage: str, index: int) -> bool:
        """Whether the shard's ledger entry is there and the file matches it."""
        if self.stage_done(stage):
            return any(entry["file"] == _file(stage, index) for entry in self._manifest()["stages"][stage])
        entry = self._entry(stage, index)
        return entry is not None and mismatch(self.directory / _file(stage, index), _record(entry)) is None

    def commit_shard(self, stage: str, index: int, rows: Sequence[parquet.Record]) -> None:
        """Write the rows, then the ledger entry that makes them count.

        The same rows again are no change; others under the name of a committed shard are refused.
        """
        path = self.directory / _file(stage, index)
        try:
            data = parquet.encode(STAGES[stage], rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if self.shard_done(stage, index):
            if mismatch(path, FileRecord(len(data), hashlib.sha256(data).hexdigest())):
                raise ValueError(f"{path} is committed already and holds other rows")
            return
        make_directory(self.directory)
        record = write_file(path, data, "store.shard")
        entry = {"file": path.name, "rows": len(rows), **record._asdict()}
        write_file(path.with_suffix(".json"), seal(entry), "store.ledger")

    def _entry(self, stage: str, index: int) -> dict[str, Any] | None:
        """The shard's ledger entry; None where it is missing or damaged, for then the shard is pending."""
        try:
            entry = unseal((self.directory / _file(stage, index)).with_suffix(".json"))
        except (FileNotFoundError, RunError):
            return None
        return entry if entry.get("file") == _file(stage, index) else None

    # ---- stages --------------------------------------------------------------------------------------------

    def stage_done(self, stage: str) -> bool:
        """Whether the manifest lists the stage."""
        if stage not in STAGES:
            raise ValueError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
        return stage in self._manifest()["stages"]

    def commit_stage(self, stage: str, shards: int) -> None:
        """List the stage in the manifest, after looking at every shard once more."""
        if self.stage_done(stage):
            raise ValueError(f"{self.directory}: {stage} is committed already")
        entries = []
        for index in range(shards):
            entry = self._entry(stage, index)
            if entry is None:
                raise RunError(f"{self.directory / _file(stage, index)}: shard {index} of {shards} is not committed")
            if problem := mismatch(self.directory / entry["file"], _record(entry)):
                raise RunError(f"{problem}. {self._mend(stage)}")
            entries.append(entry)
        self._refuse_extra(stage, entries)
        manifest = self._manifest()
        manifest["stages"][stage] = entries
        self._write_manifest(manifest)

    def read(self, stage: str) -> tuple[list[Any], int]:
        """The stage's rows, each identity once, and how many came again."""
        entries = self._manifest()["stages"].get(stage)
        if entries is None:
            raise ValueError(f"{self.directory}: {stage} is not committed")
        self._refuse_extra(stage, entries)
        rows: dict[Any, parquet.Record] = {}
        count = 0
        for entry in entries:
            for row in self._read_shard(stage, entry):
                rows.setdefault(parquet.identity(row), row)
                count += 1
        return list(rows.values()), count - len(rows)

    def _read_shard(self, stage: str, entry: Mapping[str, Any]) -> list[Any]:
        path = self.directory / entry["file"]
        if problem := mismatch(path, _record(entry)):
            raise RunError(f"{problem}. {self._mend(stage)}")
        with os_errors(path):
            data = path.read_bytes()
        rows = parquet.decode(STAGES[stage], data, path)
        if len(rows) != entry["rows"]:
            raise RunError(f"{path}: holds {len(rows)} rows, its ledger says {entry['rows']}. {self._mend(stage)}")
        return rows

    def _refuse_extra(self, stage: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """A shard that no ledger knows would be silently ignored otherwise."""
        known = {entry["file"] for entry in entries}
        extra = [path for path in self._shards_on_disk(stage) if path.name not in known]
        if extra:
            raise RunError(f"{extra[0]}: not in the manifest of its round. Move it out of the run directory.")

    def _shards_on_disk(self, stage: str) -> list[Path]:
        pattern = re.compile(rf"{stage}-\d+\.parquet")
        return sorted(path for path in self.directory.iterdir() if pattern.fullmatch(path.name))

    def _mend(self, stage: str) -> str:
        return (
            f"Restore it from a backup; or, where no checkpoint is newer than round {self._round}, delete "
            f"{self.directory} and start the run again: the round is made again"
        )

    # ---- reports and manifest ------------------------------------------------------------------------------

    def commit_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a report and list it; the same report again is no change, another one under its name is refused."""
        data = to_json(value)
        manifest = self._manifest()
        if name in manifest["reports"]:
            if to_json(self.read_json(name)) != data:
                raise ValueError(f"{self.directory / name}.json is committed already and says something else")
            return
        if f"{name}.json" == _MANIFEST or re.fullmatch(r".*-\d{5}", name):
            raise ValueError(f"{name}.json is the store's own")
        make_directory(self.directory)
        manifest["reports"][name] = write_file(self.directory / f"{name}.json", data, "store.report")._asdict()
        self._write_manifest(manifest)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A report that the manifest lists, checked against it; None where it is not listed."""
        recorded = self._manifest()["reports"].get(name)
        if recorded is None:
            return None
        path = self.directory / f"{name}.json"
        if problem := mismatch(path, _record(recorded)):
            raise RunError(f"{problem}. {self._mend(name)}.")
        return read_document(path)

    def _manifest(self) -> dict[str, Any]:
        try:
            manifest = unseal(self.directory / _MANIFEST)
        except FileNotFoundError:
            return {"round": self._round, "stages": {}, "reports": {}}
        if manifest["round"] != self._round:
            raise RunError(f"{self.directory / _MANIFEST}: belongs to round {manifest['round']}")
        return manifest

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        make_directory(self.directory)
        write_file(self.directory / _MANIFEST, seal(manifest), "store.manifest")


def _file(stage: str, index: int) -> str:
    return f"{stage}-{index:05d}.parquet"


def _record(entry: Mapping[str, Any]) -> FileRecord:
    return FileRecord(entry["bytes"], entry["sha256"])
