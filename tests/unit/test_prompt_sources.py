"""Files and hub datasets as rows; every damaged one refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from align.errors import InputError
from align.prompt_sources import Row, RowErrors, parse_hub, read_rows, text_of

ROWS = [{"prompt": 'a, "b"\nc', "answer": "1"}, {"prompt": "ünï", "answer": "2"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'prompt,answer\n"a, ""b""\nc",1\nünï,2\n'.encode()


def rows(path: Path, **keywords: Any) -> list[Row]:
    return read_rows(str(path), columns=("prompt", "answer"), key="prompts.source", **keywords)


def refusal(path: Path | str, **keywords: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_rows(str(path), columns=("prompt", "answer"), key="prompts.source", **keywords)
    assert str(caught.value).startswith("prompts.source: ")
    return str(caught.value)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv", "x.csv.gz", "x.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, {"prompt": [r["prompt"] for r in ROWS], "answer": ["1", "2"], "other": [0, 0]})
    else:
        data = CSV if ".csv" in name else JSONL
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = rows(path)
    assert [dict(row.values) for row in found] == ROWS
    last = {"x.csv": 4, "x.csv.gz": 4}.get(name, 2)  # the first CSV record spans two lines
    assert found[1].where == f"{path}:{last}"
    assert rows(path, limit=1) == found[:1]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\n\n"))
    assert [row.where for row in rows(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n\n", "holds no rows"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', ":2:15: not valid JSON"),
        ("x.jsonl", b'["a"]\n', ":1: expected a JSON object, found"),
        ("x.jsonl", b'{"prompt": "a", "prompt": "b"}\n', ":1: not valid JSON: the key 'prompt' stands there twice"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ":2: byte 13 is not UTF-8"),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), ":1: byte 1 is not UTF-8"),
        ("x.jsonl", b"[" * 100_000, ":1: not valid JSON"),
        ("x.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", ":1: not valid JSON"),
        ("x.jsonl.gz", gzip.compress(JSONL)[:-9], "the compressed file is cut short or damaged"),
        ("x.jsonl.gz", JSONL, "the compressed file is cut short or damaged"),
        ("x.jsonl.gz", gzip.compress(JSONL)[:12] + b"junkjunk", "the compressed file is cut short or damaged"),
        ("x.csv", b"prompt,answer\na\n", ":2: has 1 fields, the header names 2"),
        ("x.csv", b"prompt,answer,answer\n", ":1: the header names 'answer' twice"),
        ("x.csv", b"promt,answer\na,1\n", "no column 'prompt'; did you mean 'promt'"),
        ("x.csv", b'prompt,answer\na,"1\n', ":2: not valid CSV"),
        ("x.csv", b"prompt,answer\n\xe9,1\n", ":2: byte 1 is not UTF-8"),
        ("x.csv", b"prompt,answer\n", "holds no rows"),
        ("x.parquet", b"PAR1 this is not parquet PAR1", "the Parquet file is cut short or damaged"),
        ("x.txt", b"hello", "cannot tell the format"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    text = refusal(path)
    assert message in text and str(path) in text and "\n" not in text


def test_a_cut_parquet_file_and_missing_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["a"] * 1000, "answers": ["1"] * 1000})
    assert "no column 'answer'; did you mean 'answers'?" in refusal(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "the Parquet file is cut short or damaged" in refusal(path)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    assert "is a directory; name a file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "x:1: prompt: expected text, found true"),
        (None, "x:1: prompt: expected text, found null"),
        (1.5, "x:1: prompt: expected text, found 1.5"),
        ({"a": 1}, 'x:1: prompt: expected text, found {"a": 1}'),
        (b"ab", "x:1: prompt: expected text, found 2 bytes"),
        (" \n", "x:1: prompt: is empty"),
        ("ab\ud800", "x:1: prompt: holds half of a surrogate pair at character 3, which is not valid Unicode"),
    ],
)
def test_what_is_no_text_is_named(value: object, message: str) -> None:
    errors = RowErrors()
    assert text_of(Row("x:1", {"prompt": value}), "prompt", errors) is None
    with pytest.raises(InputError) as caught:
        errors.check()
    assert str(caught.value) == message


def test_whole_numbers_count_as_answers_only_where_asked() -> None:
    row, errors = Row("x:1", {"answer": 42, "flag": True}), RowErrors()
    assert text_of(row, "answer", errors, integers=True) == "42" and errors.count == 0
    assert text_of(row, "answer", errors) is None and text_of(row, "flag", errors, integers=True) is None
    assert errors.count == 2


def test_twenty_errors_are_shown_and_the_rest_counted() -> None:
    errors = RowErrors()
    for number in range(1, 31):
        text_of(Row(f"x:{number}", {"promt": "a"}), "prompt", errors)
    with pytest.raises(InputError) as caught:
        errors.check("mend it")
    lines = str(caught.value).split("\n")
    assert lines[0] == "x:1: no column 'prompt'; did you mean 'promt'?"
    assert len(lines) == 22 and lines[-2:] == ["… and 10 more rows", "mend it"]


def test_hub_names() -> None:
    assert parse_hub("hub:owner/name") == ("owner/name", None, "train")
    assert parse_hub("hub:openai/gsm8k/main:test") == ("openai/gsm8k", "main", "test")
    assert parse_hub("hub:name:validation") == ("name", None, "validation")
    with pytest.raises(InputError, match="names no dataset"):
        parse_hub("hub::train")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves its cache files to the collector
def test_a_hub_dataset_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a local directory for a dataset's name, so the real loading code runs without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(JSONL)
    (tmp_path / "data" / "test.jsonl").write_bytes(JSONL.splitlines(keepends=True)[1])
    source = f"hub:{tmp_path}/data"
    found = read_rows(source, columns=("prompt", "answer"), key="prompts.source")
    assert [dict(row.values) for row in found] == ROWS and found[1].where == f"{source}:2"
    assert len(read_rows(f"{source}:test", columns=("prompt",), key="prompts.source")) == 1
    assert "no column 'prompt'" not in refusal(f"{source}:nosuch")
    assert "could not be loaded" in refusal(f"{source}:nosuch")
    with pytest.raises(InputError, match="no column 'question'"):
        read_rows(source, columns=("question",), key="prompts.source")


def test_the_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> None:
        asked.append((name, config, split, revision))
        raise ValueError("stop here\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = refusal("hub:owner/name:test", revision="abc")
    assert asked == [("owner/name", None, "test", "abc")]
    assert message == "prompts.source: hub:owner/name:test: the dataset could not be loaded: stop here"
