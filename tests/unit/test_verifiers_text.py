"""Words, sentences, syllables, and the verifiers that are built on them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.verifiers.base import Abstain, Item
from align.verifiers.form import Format, Length, Repetition
from align.verifiers.lexicon import Lexicon, Vocabulary
from align.verifiers.readability import Readability, is_easy
from align.verifiers.spec import FormatSpec, LexiconSpec, ReadabilitySpec, VocabularySpec
from align.verifiers.text import count_sentences, count_syllables, terms, words

LEXICONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "lexicons"
needs_lexicons = pytest.mark.skipif(not LEXICONS.is_dir(), reason="the public word lists are not here")


def item(response: str, tokens: int = 3) -> Item:
    return Item("s", "p", "Once", response, None, tokens, "stop")


def test_words() -> None:
    assert words("'Don't!' said the dogs' friend") == ("don't", "said", "the", "dogs", "friend")
    assert words("It’s 3 o’clock") == ("it's", "o'clock")  # typographic apostrophes
    assert words("Café well-known naïve") == ("café", "well", "known", "naïve")
    assert words("<b>bold</b> \x1b[31mred") == ("b", "bold", "b", "mred")
    assert words("12 + 7 = '' ' _") == ()
    assert terms("12 + 7b, It's") == ("12", "7b", "it's")


@given(st.text(max_size=200))
def test_words_do_not_depend_on_what_stands_around(text: str) -> None:
    assert words(f"one. {text} .two") == ("one", *words(text), "two")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("...", 0),
        ("One", 1),
        ("One. Two! Three?", 3),
        ("One... Two?! three", 3),
        ('"Hi!" said Tom. "Go."', 3),
        ("Mr. Fox met Dr. Who.", 1),
        ("It costs 3.14 dollars", 1),
    ],
)
def test_sentences(text: str, sentences: int) -> None:
    assert count_sentences(text) == sentences


@pytest.mark.parametrize(
    ("word", "syllables"),
    [
        ("the", 1), ("cat", 1), ("happy", 2), ("make", 1), ("table", 2), ("wanted", 2), ("used", 1), ("names", 1),
        ("boxes", 2), ("being", 2), ("radio", 3), ("nation", 2), ("careful", 2), ("lovely", 2), ("rhythm", 1),
        ("beautiful", 3), ("don't", 1), ("hm", 1), ("apples", 2), ("watches", 2), ("smile", 1), ("little", 2),
    ],
)  # fmt: skip
def test_syllables(word: str, syllables: int) -> None:
    assert count_syllables(word) == syllables


def test_lexicon_mean_valence() -> None:
    verifier = Lexicon("v", {"good": 1.9, "bad": -2.5})
    assert verifier.value(item("A good, good dog. Bad cat!")) == pytest.approx((1.9 + 1.9 - 2.5) / 6)
    assert verifier.value(item("Nothing here")) == 0.0
    with pytest.raises(Abstain, match="no words in the response"):
        verifier.value(item("123 !"))


def test_vocabulary_share() -> None:
    verifier = Vocabulary("v", {"the", "dog", "don't"})
    assert verifier.value(item("The dog's blorf don't")) == pytest.approx(3 / 4)


def test_repetition() -> None:
    verifier = Repetition("r", 2)
    # "a b a b c": ab, ba, ab, bc -> 3 distinct of 4
    assert verifier.value(item("A b, a b c")) == 3 / 4
    assert verifier.value(item("one two")) == 1.0
    assert Repetition("r", 4).value(item("12 12 12 12 12 12")) == pytest.approx(1 / 3)
    with pytest.raises(Abstain, match="fewer than 2 words"):
        verifier.value(item("one"))


def test_length_counts_what_it_is_told_to() -> None:
    assert Length("l", "tokens", 2, 3).value(item("a", tokens=3)) == 1.0
    assert Length("l", "tokens", 2, 3).value(item("a", tokens=4)) == 0.0
    assert Length("l", "words", 2, 2).value(item("two words")) == 1.0
    assert Length("l", "words", 3, None).value(item("two words")) == 0.0
    assert Length("l", "characters", 0, 5).value(item("12345")) == 1.0
    assert Length("l", "characters", 0, 5).value(item("123456")) == 0.0


def test_format_whole_and_anywhere() -> None:
    def spec(where: str) -> FormatSpec:
        return FormatSpec.model_validate({"kind": "format", "name": "f", "pattern": r"<a>.*</a>", "where": where})

    assert Format.from_spec(spec("whole")).value(item("<a>1\n2</a>")) == 1.0  # the dot matches newlines
    assert Format.from_spec(spec("whole")).value(item("<a>1</a> ")) == 0.0
    assert Format.from_spec(spec("anywhere")).value(item("so <a>1</a>!")) == 1.0
    assert Format.from_spec(spec("anywhere")).value(item("")) == 0.0


def test_readability_by_hand() -> None:
    text = "The cat sat. The happy dog ran away!"  # 8 words, 2 sentences, 10 syllables
    assert Readability("r", "sentence_length").value(item(text)) == -4.0
    assert Readability("r", "flesch").value(item(text)) == pytest.approx(206.835 - 1.015 * 4 - 84.6 * 10 / 8)
    easy = {"the", "cat", "sat", "happy", "dog", "run", "away"}
    # "ran" is hard: 12.5%
    expected = -(0.1579 * 12.5 + 0.0496 * 4 + 3.6365)
    assert Readability("r", "dale_chall", easy).value(item(text)) == pytest.approx(expected)
    assert Readability("r", "dale_chall", easy | {"ran"}).value(item(text)) == pytest.approx(-0.0496 * 4)
    with pytest.raises(Abstain, match="no words"):
        Readability("r", "flesch").value(item("?!"))


def test_regular_forms_of_easy_words_are_easy() -> None:
    easy = {"dog", "cry", "hope", "run", "big", "nice", "happy"}
    for word in ("dogs", "dog's", "cries", "cried", "hoped", "hoping", "running", "bigger", "nicest", "happiest"):
        assert is_easy(word, easy), word
    for word in ("doggerel", "s", "ing", "crisp", "hopeful"):
        assert not is_easy(word, easy), word


@needs_lexicons
def test_the_public_lists() -> None:
    def lexicon(file: str, negative: str | None = None) -> Lexicon:
        negative_file = str(LEXICONS / negative) if negative else None
        return Lexicon.from_spec(
            LexiconSpec(kind="lexicon", name="v", file=str(LEXICONS / file), negative_file=negative_file)
        )

    happy, sad = item("a happy day"), item("a terrible day")
    assert lexicon("vader_lexicon.txt.gz").value(happy) == pytest.approx(2.7 / 3)
    assert lexicon("vader_lexicon.txt.gz").value(sad) == pytest.approx(-2.1 / 3)
    assert lexicon("AFINN-en-165.txt").value(happy) == 1.0  # happy is 3
    assert lexicon("pattern_en_sentiment.xml.gz").value(happy) == pytest.approx(0.8 / 3)
    hu_liu = lexicon("huliu_positive.txt", "huliu_negative.txt")
    assert (hu_liu.value(happy), hu_liu.value(sad)) == (pytest.approx(1 / 3), pytest.approx(-1 / 3))
    assert hu_liu.value(item("enviously")) == 0.0  # stands on both lists
    assert hu_liu.value(item("naïve")) == -1.0  # the negative list is Latin-1
    cmudict = Vocabulary.from_spec(VocabularySpec(kind="vocabulary", name="c", file=str(LEXICONS / "cmudict.dict.gz")))
    assert cmudict.value(item("Once upon a time, Tom's frumpled dog")) == pytest.approx(6 / 7)
    dale_chall = ReadabilitySpec(
        kind="readability", name="d", formula="dale_chall", file=str(LEXICONS / "dale_chall_easy_words.txt")
    )
    assert Readability.from_spec(dale_chall).value(item("The dogs played. Mr. Fox ran away.")) == pytest.approx(
        -0.0496 * 3.5
    )


@pytest.mark.parametrize("unit", ["a", ".", '!"', "a.", "'", "ab' ", "Mr."])
def test_time_is_linear(unit: str) -> None:
    """A million characters of anything are read in seconds."""
    response = item(unit * (1_000_000 // len(unit)) + "x")
    start = time.monotonic()
    for verifier in (Readability("r", "flesch"), Repetition("r", 1), Vocabulary("v", {"a"})):
        verifier.value(response)
    assert time.monotonic() - start < 20
