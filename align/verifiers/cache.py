"""Verdicts that were given before, found again by content, across rounds and runs.

The key is a hash of the verifier (its block without what only names or transforms its answers, the files and the
checkpoint it reads, the code of this package) and of everything an item shows it.  Only numbers are remembered: what
gave none may have been the machine's fault.  A verifier that looks at other responses, or at a coin, has no entry.

One SQLite file for all runs of a directory: what was put is there whole or not at all after kill -9, and ranks and
runs may share it.  It is an aid: a damaged file is begun anew, a full disk ends its use, and both are told.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from align.model_files import fingerprint
from align.storage.durable import hash_file, make_directory
from align.verifiers.base import Item
from align.verifiers.registry import sees_whole_prompts
from align.verifiers.spec import VerifierSpec

FILE = "verdict_cache.sqlite"
WAIT_S = 60.0  # for another process that is writing
KEYS_PER_QUERY = 500
QUICK = {
    "arithmetic", "length", "repetition", "lexicon", "vocabulary", "readability", "self_consistency", "noise",
}  # fmt: skip
"""Kinds that take microseconds: they share a process, and asking them again is as quick as looking up."""
_NOT_THE_VERDICT = {"name", "family", "invert", "flip_rate", "timeout_s", "workers"}
_SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, value REAL NOT NULL, stage BLOB) WITHOUT ROWID"
_PUT = (
    "INSERT INTO verdicts VALUES (?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET value = min(value, excluded.value) WHERE stage = excluded.stage"
)


class VerdictCache:
    """The remembered numbers of one directory of runs."""

    def __init__(self, directory: Path, setting: str = "", tell: Callable[[str], object] = print) -> None:
        """`setting` is what verdicts depend on beside the verifier's own block: the number format of its engine.

        `tell` hears what goes wrong with the file; the verdicts are right without it.
        """
        self._path, self._setting, self._tell = directory / FILE, setting, tell
        self._open: sqlite3.Connection | None = None
        self._names: dict[str, bytes] = {}
        make_directory(directory)
        try:
            self._connect()
        except sqlite3.OperationalError as error:
            self._give_up(error)
        except sqlite3.DatabaseError as error:
            tell(f"{self._path}: damaged ({error}), begun anew")
            self._path.unlink()
            self._connect()

    def keys(self, spec: VerifierSpec, items: Sequence[Item]) -> list[bytes]:
        """The key of each item for this verifier."""
        if spec.name not in self._names:
            self._names[spec.name] = identity(spec, self._setting)
        verifier = self._names[spec.name]
        return [item_key(verifier, item) for item in items]

    def get(self, keys: Sequence[bytes], stage: str) -> dict[bytes, float]:
        """The numbers that are known, less those that this very stage has put.

        A stage that is begun again after a kill then asks what it asked the first time, so both give the same bytes.
        """
        found: dict[bytes, float] = {}
        if self._open is None:
            return found
        wanted, own = list(dict.fromkeys(keys)), _stage_key(stage)
        try:
            for start in range(0, len(wanted), KEYS_PER_QUERY):
                part = wanted[start : start + KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                rows = self._open.execute(
                    f"SELECT key, value FROM verdicts WHERE key IN ({marks}) AND stage IS NOT ?", [*part, own]
                )
                found.update((key, value) for key, value in rows if isinstance(value, float) and math.isfinite(value))
        except sqlite3.Error as error:
            self._give_up(error)
        return found

    def put(self, values: Mapping[bytes, float], stage: str) -> None:
        """Remember these.  Of two numbers that one stage gives a key (an engine's last bits), the smaller stays, so
        that it does not matter which rank came first; those of other stages stay as they are."""
        if self._open is None or not values:
            return
        own = _stage_key(stage)
        try:
            with self._open:
                self._open.executemany(_PUT, [(key, value, own) for key, value in values.items()])
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Let the file go."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _connect(self) -> None:
        self._open = sqlite3.connect(self._path, timeout=WAIT_S)
        self._open.execute("PRAGMA synchronous = NORMAL")
        with self._open:
            self._open.execute(_SCHEMA)
        self._open.execute("SELECT key, value, stage FROM verdicts LIMIT 1").fetchall()

    def _give_up(self, error: sqlite3.Error) -> None:
        self._tell(f"{self._path}: {error}; verdicts are not remembered from here on")
        self.close()


def is_quick(spec: VerifierSpec) -> bool:
    """Whether the verifier shares a process with others: a rule without a pattern of the user's own."""
    exact = spec.kind == "answer" and spec.match == "exact" and spec.extract != "pattern"
    return (spec.kind in QUICK or exact) and spec.workers == 1


def remembers(spec: VerifierSpec) -> bool:
    """Whether a verdict is worth remembering and depends on nothing but the item: no coin, no other response."""
    return not is_quick(spec) and spec.kind != "noise" and not sees_whole_prompts(spec)


def open_cache(
    specs: Sequence[VerifierSpec],
    directory: Path,
    dtype: str,
    policy_dir: Callable[[], Path],
    tell: Callable[[str], object],
) -> VerdictCache | None:
    """The cache of a directory of runs; None where none of these verifiers would use it."""
    if not any(remembers(spec) for spec in specs):
        return None
    judges = any(getattr(spec, "model", "") is None for spec in specs)  # the policy before training
    return VerdictCache(directory, f"{dtype} {fingerprint(policy_dir()) if judges else ''}", tell)


def identity(spec: VerifierSpec, setting: str = "") -> bytes:
    """Sixteen bytes that change with anything the verifier's numbers depend on."""
    block = spec.model_dump(mode="json", exclude=_NOT_THE_VERDICT)
    files = {
        key: hash_file(Path(value)).sha256
        for key, value in block.items()
        if key.endswith("file") and isinstance(value, str)
    }
    model = block.get("model")
    if isinstance(model, str) and Path(model).is_dir():
        files["model"] = fingerprint(Path(model))
    text = json.dumps([block, files, setting, _code()], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def item_key(verifier: bytes, item: Item) -> bytes:
    """Sixteen bytes of everything that the item shows a verifier; which sample it is does not count."""
    digest = hashlib.blake2b(verifier, digest_size=16)
    flat = [part for pair in (*item.columns, ("turns", str(len(item.turns))), *item.turns) for part in pair]
    shown = (item.prompt, item.response, item.answer, item.response_tokens, item.finish_reason, *flat)
    for part in shown:
        text = b"\0" if part is None else b"=" + str(part).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.digest()


def _stage_key(stage: str) -> bytes:
    return hashlib.blake2b(stage.encode(), digest_size=8).digest()


@functools.cache
def _code() -> str:
    """A hash of the verifiers' own code: another version may answer otherwise."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
