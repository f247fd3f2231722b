"""Word lists: every shape that is read, and every way a file can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from align.errors import InputError
from align.verifiers import registry
from align.verifiers.spec import LexiconSpec, ReadabilitySpec, VocabularySpec
from align.verifiers.wordlists import read_valences, read_vocabulary


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_table_with_further_columns_phrases_and_smileys(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "good\t1.9\t0.94\t[2]\r\nGOOD\t2.1\r\n\r\ncan't stand\t-3\r\n;)\t0.9\r\nisn't\t-1")
    found = read_valences(path)
    assert found.values == {"good": pytest.approx(2.0), "isn't": -1.0}  # repeated words are averaged
    assert (found.entries, found.unmatched) == (5, 2)


def test_xml_averages_the_senses(tmp_path: Path) -> None:
    xml = '<?xml version="1.0"?><sentiment><word form="able" polarity="0.5"/><word form="able" polarity="-0.1"/>'
    assert read_valences(write(tmp_path / "l.xml", xml + "</sentiment>")).values == {"able": pytest.approx(0.2)}


def test_plain_list_with_comments_in_latin_1(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", ";;; a comment\n;\n\nna\xefve\n# more\nbad luck\nMr.\n".encode("latin-1"))
    found = read_valences(path)
    assert found.values == {"naïve": 1.0, "mr": 1.0}
    assert found.unmatched == 1


def test_dictionary_with_variants_gzipped_under_any_name(tmp_path: Path) -> None:
    text = ";;; comment\na AH0\na(2) EY1\naaron's(2) EH1 # name\nable-bodied EY1\n'bout B\n"
    found = read_vocabulary(write(tmp_path / "cmu", gzip.compress(text.encode())))
    assert found.words == {"a", "aaron's"}
    assert (found.entries, found.unmatched) == (5, 2)


def test_a_mended_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "good\t1\n")
    assert read_valences(path).values == {"good": 1.0}
    write(tmp_path / "l.txt", "good\t1\nbad\t-1\n")
    assert read_valences(path).values == {"good": 1.0, "bad": -1.0}


PACKED = gzip.compress(b"word\t1\n" * 1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (PACKED[:-9], "damaged or cut-off gzip"),
        (PACKED[:40] + b"\xff" * 20 + PACKED[60:], "damaged or cut-off gzip"),
        ("good\t1".encode("utf-16"), "control character"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "neither UTF-8 nor Windows-1252|control character"),
        (b"caf\x81", "byte 3 is neither UTF-8 nor Windows-1252"),
        (b"good\t1\nbad\n", r"l\.txt:2: wants `word<TAB>number`, found 'bad'"),
        (b"good\tnice\n", r"l\.txt:1: wants"),
        (b"good\tnan\n", r"l\.txt:1: wants"),
        (b"<sentiment><word form='a'/></sentiment>", "<word> number 1 wants"),
        (b"<sentiment><word form='a'", "not well-formed XML"),
        (b"<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>", "may not declare entities"),
        (b"<sentiment/>", "none of its 0 entries"),
        (b"bad luck\ngood luck\n", "none of its 2 entries is a single word"),
    ],
)
def test_wrong_files_are_refused_with_file_and_key(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "l.txt", data)
    with pytest.raises(InputError, match=message) as error:
        registry.check(LexiconSpec(kind="lexicon", name="vader", file=path))
    assert str(error.value).startswith(f"verifiers.vader.file: {path}")


def test_missing_files_are_refused_by_every_kind_that_reads_one(tmp_path: Path) -> None:
    good, none = write(tmp_path / "l.txt", "good\n"), str(tmp_path / "none.txt")
    specs = [
        (LexiconSpec(kind="lexicon", name="v", file=none), "file"),
        (LexiconSpec(kind="lexicon", name="v", file=good, negative_file=none), "negative_file"),
        (VocabularySpec(kind="vocabulary", name="v", file=none), "file"),
        (ReadabilitySpec(kind="readability", name="v", formula="dale_chall", file=none), "file"),
    ]
    for spec, key in specs:
        with pytest.raises(InputError, match=rf"^evaluation\.gold\.{key}: .*none\.txt: cannot be read: No such file"):
            registry.check(spec, where="evaluation.gold")
    with pytest.raises(InputError, match="Is a directory"):
        registry.check(VocabularySpec(kind="vocabulary", name="v", file=str(tmp_path)))


def test_entries_that_can_match_nothing_are_remarked(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "good\t1\nbad luck\t-1\n")
    (remark,) = registry.check(LexiconSpec(kind="lexicon", name="v", file=path))
    assert "1 of 2 entries are not single words" in remark
    assert registry.check(LexiconSpec(kind="lexicon", name="v", file=write(tmp_path / "m.txt", "good\n"))) == []
