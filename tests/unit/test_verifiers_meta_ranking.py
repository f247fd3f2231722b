"""Meta Ranking: values by hand, the planted comparator of its check, and files that are wrong."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError
from align.verifiers.base import Abstain, Item
from align.verifiers.fence import Question
from align.verifiers.meta_ranking import MetaRanking, Reference, choose_references, read_references
from align.verifiers.spec_models import MetaRankingSpec


class Comparator:
    """Answers (Better, Same, Worse) by a function of the two answers."""

    def __init__(self, says: Callable[[str, str], Any]) -> None:
        self._says, self.account = says, Counter()

    def choose(self, questions: Sequence[Question], words: Sequence[str]) -> list[Any]:
        return [self._says(question.texts[1][1], question.texts[3][1]) for question in questions]

    def write(self, questions: Sequence[Question], max_tokens: int) -> list[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def item(response: str, prompt: str = "q") -> Item:
    return Item(response, prompt, prompt, response, None, 1, "stop")


def spec(**settings: Any) -> MetaRankingSpec:
    block = {"kind": "meta_ranking", "name": "mr", "model": "m", "file": "f", **settings}
    return MetaRankingSpec.model_validate(block)


def test_the_four_cases_by_hand() -> None:
    """A comparator that is sure: 5 beats 3 in either order; S = 1 and W = 0.5."""

    def says(first: str, second: str) -> list[float]:
        return [float(first > second), float(first == second), float(first < second)]

    def value(references: list[Reference]) -> Any:
        return MetaRanking(spec(), Comparator(says), references).verify([item("5")])[0]

    assert value([Reference("r", "3", True)]) == 1.0  # better than right
    assert value([Reference("r", "3", False)]) == 0.5  # better than wrong
    assert value([Reference("r", "7", True)]) == -0.5  # worse than right
    assert value([Reference("r", "7", False)]) == -1.0  # worse than wrong
    assert value([Reference("r", "5", True)]) == 0.0
    assert value([Reference("r", "3", True), Reference("r", "7", False)]) == 0.0


def test_a_reference_to_its_own_prompt_is_found_behind_the_chat_template() -> None:
    rendered = Item("i", "p", "<user>q<end>", "5", None, 1, "stop", turns=(("user", "q"),))
    found = MetaRanking(spec(), Comparator(lambda a, b: [1.0, 0.0, 0.0]), [Reference("q", "3", True)])
    (none,) = found.verify([rendered])
    assert isinstance(none, Abstain) and "own prompt" in str(none)


def test_a_liking_for_pair_a_cancels() -> None:
    found = MetaRanking(spec(weak=1.0), Comparator(lambda a, b: [0.9, 0.0, 0.1]), [Reference("r", "3", True)])
    assert found.verify([item("5")]) == pytest.approx([0.0])


def test_more_references_tell_more() -> None:
    """Latent quality u, comparator sigmoid(u_t - u_i) with noise of each question: AUC rises with N."""
    draw = random.Random(3)
    quality = {str(i): draw.gauss(0, 1) for i in range(400)}

    def says(first: str, second: str) -> list[float]:
        noise = draw.gauss(0, 2.0)
        better = 1 / (1 + math.exp(-(quality[first] - quality[second] + noise)))
        return [better, 0.0, 1 - better]

    references = [Reference("r", str(i), quality[str(i)] > 0) for i in range(200, 400)]
    targets = [item(str(i)) for i in range(200)]

    def auc(count: int) -> float:
        values = MetaRanking(spec(references=count), Comparator(says), references).verify(targets)
        good = [v for v, t in zip(values, targets, strict=True) if quality[t.response] > 0]
        bad = [v for v, t in zip(values, targets, strict=True) if quality[t.response] <= 0]
        return sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))

    few, some, many = auc(1), auc(5), auc(25)
    assert few < some < many and many > 0.85


def test_abstentions() -> None:
    own = MetaRanking(spec(), Comparator(lambda a, b: [1.0, 0.0, 0.0]), [Reference("q", "3", True)])
    assert "own prompt" in str(own.verify([item("5")])[0])
    silent = MetaRanking(spec(), Comparator(lambda a, b: [0.001, 0.0, 0.0]), [Reference("r", "3", True)])
    (none,) = silent.verify([item("5")])
    assert isinstance(none, Abstain) and "answers none of Better, Same, Worse" in str(none)


def test_references_are_chosen_alike_whatever_the_order() -> None:
    pool = [Reference("p", str(i), i % 3 == 0) for i in range(30)]
    chosen = choose_references(pool, 6)
    assert chosen == choose_references(pool[::-1], 6)
    assert [r.good for r in chosen] == [True, False] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"f\.jsonl:2: not JSON"),
        ('{"prompt": "a", "response": ""}', "wants the texts"),
        ('{"prompt": "a", "response": "b"}', "wants `good`"),
        ('{"prompt": "a", "response": "b", "good": "yes"}', "wants `good`"),
        ("[1]", "wants the texts"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_wrong_files_are_refused_with_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b", "good": True}) + "\n" + line)
    with pytest.raises(InputError, match=message):
        read_references(str(file), "verifiers.mr")
    with pytest.raises(InputError, match=r"verifiers\.mr\.file: .*cannot be read"):
        read_references(str(tmp_path / "absent"), "verifiers.mr")
