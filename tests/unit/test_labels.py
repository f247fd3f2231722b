"""Labels in the loop: what is read, what is refused by name, and that nothing else of gold reaches the scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.ensemble.calibrate import PairProbability
from align.errors import InputError
from align.labels import (
    STAGE,
    Labelled,
    combine_told,
    label_warnings,
    read_labels,
    shown_gold,
    shown_prompts,
    told,
    unseen,
)
from align.prompts import load_prompts
from align.recipe import Recipe, Scratch
from align.records import Sample, Verdict
from align.stages import _combine, _pair_responses
from align.training.scratch import build_tokenizer
from align.verifiers.base import Item
from tests.unit.recipe_texts import MINIMAL

TOKENIZER = build_tokenizer(Scratch())
NO_FILE = Labelled()


def make(tmp_path: Path, **labels: object) -> Recipe:
    import yaml

    settings: dict[str, Any] = yaml.safe_load(MINIMAL)
    settings |= {
        "prompts": {"source": "arithmetic", "arithmetic": {"count": 40}, "eval_fraction": 0.3},
        "rounds": {"count": 1, "prompts_per_round": 20},
        "evaluation": {"gold": {"kind": "answer", "name": "gold"}},
        "verifiers": [{"kind": "arithmetic", "name": n, "check": c}
                      for n, c in (("a", "nines"), ("b", "last_digit"), ("c", "magnitude"))],
        "ensemble": {"method": "auto", "labels": labels},
        "output_dir": str(tmp_path),
    }  # fmt: skip
    return Recipe.model_validate(settings)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(prompt: str, response: str = "1", label: object = 1, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "response": response, "label": label, **more}


def test_a_file_is_read_and_counted(tmp_path: Path) -> None:
    plain = load_prompts(make(tmp_path), TOKENIZER, None)
    known = plain.train[0]
    file = write(tmp_path / "l.jsonl", row(known.text), row("1+1=", "2", True, answer=2), row("1+1=", "", "0"),
                 row("1+1=", "2", "1"))  # fmt: skip
    found = read_labels(make(tmp_path, file=file), plain, TOKENIZER)
    assert found.report == {"rows": 3, "good": 2, "prompts": 2, "duplicates": 1}
    assert found.good == (True, True, False)
    assert [(i.prompt_id == known.id, i.answer, i.response_tokens) for i in found.items] == [
        (True, known.answer, 1), (False, "2", 1), (False, None, 0)
    ]  # fmt: skip
    assert read_labels(make(tmp_path), plain, TOKENIZER) == Labelled()


def test_bad_rows_and_evaluation_prompts_are_refused_by_name(tmp_path: Path) -> None:
    plain = load_prompts(make(tmp_path), TOKENIZER, None)
    seen = plain.eval[0].text
    file = write(tmp_path / "l.jsonl", row("1+1="), row(seen), row("2+2=", "4", "perhaps"), row("1+1=", label=0),
                 row("3+3=", label=None))  # fmt: skip
    with pytest.raises(InputError) as caught:
        read_labels(make(tmp_path, file=file), plain, TOKENIZER)
    told_lines = str(caught.value).splitlines()
    assert told_lines == [
        f"{file}:2: prompt: {seen!r} is an evaluation prompt of this recipe; take it out",
        f"{file}:3: label: 'perhaps' is not 1 or 0",
        f"{file}:4: label: the same response to the same prompt has the other label further up",
        f"{file}:5: label: 'None' is not 1 or 0",
    ]


def test_a_recipe_that_has_no_gold_to_show_is_refused(tmp_path: Path) -> None:
    recipe = make(tmp_path, prompts=3)
    blind = recipe.model_dump()
    blind["evaluation"]["gold"] = None
    with pytest.raises(ValueError, match="no evaluation.gold"):
        Recipe.model_validate(blind)
    with pytest.raises(ValueError, match="a round has 20 prompts only"):
        make(tmp_path, prompts=21)


@pytest.mark.parametrize(
    ("setting", "method"), [("ridge", "logistic"), ("clusters", "weaver"), ("covariance_shrinkage", "gaussian_full")]
)
def test_a_setting_that_the_method_does_not_read_is_refused(tmp_path: Path, setting: str, method: str) -> None:
    block = make(tmp_path, prompts=3).model_dump()
    block["ensemble"][setting] = 3 if setting == "clusters" else 1.0
    with pytest.raises(ValueError, match=rf"ensemble\.{setting}: is read by `method: {method}` only, not by auto"):
        Recipe.model_validate(block)
    block["ensemble"]["method"] = method
    assert Recipe.model_validate(block).ensemble.method == method


def test_too_few_labels_or_one_class_is_told() -> None:
    assert "no response" in label_warnings(0, 0)[0]
    assert "the only label says good" in label_warnings(1, 1)[0]
    assert "all 9 labels say bad" in label_warnings(9, 0)[0]
    assert "7 labels are too few" in label_warnings(7, 3)[0] and label_warnings(8, 3) == ()


class Round:
    """A round without engines: 20 prompts, 4 responses each, three verifiers right 80% of the time."""

    def __init__(self, recipe: Recipe, gold: Sequence[float], file: Labelled = NO_FILE) -> None:
        self.recipe, self.store, self._file = recipe, self, file
        rng = np.random.default_rng(0)
        truth = rng.random(80) < 0.5
        self.samples = [
            Sample(f"s{i}", f"p{i // 4}", i % 4, 0, 0, (), (), (), str(i), "stop", 1.0, 1.0, 0, 8) for i in range(80)
        ]
        self._rows: dict[str, list[Any]] = {
            "samples": self.samples,
            "gold": [Verdict(f"s{i}", "gold", g, None) for i, g in enumerate(gold)],
            "verdicts": [Verdict(f"s{i}", n, float(truth[i] == (rng.random() < 0.8)), None)
                         for i in range(80) for n in "abc"],
            STAGE: [Verdict(item.sample_id, n, 1.0, None) for item in file.items for n in "abc"],
        }  # fmt: skip
        self.truth = truth.astype(float)
        self.reports: dict[str, str] = {}
        self.said: list[str] = []

    def read(self, round_index: int, stage: str) -> list[Any]:
        return self._rows[stage]

    def labelled(self) -> Labelled:
        return self._file

    def commit_shard(self, round_index: int, stage: str, index: int, rows: list[Any]) -> None:
        self._rows[stage] = rows

    def gold_values(self, round_index: int, stage: str, samples: list[Sample]) -> list[float | None]:
        return self.truth.tolist()

    def keep(self, round_index: int, name: str, value: Any) -> None:
        self.reports[name] = json.dumps(value)

    def kept(self, round_index: int, name: str) -> Any:
        return json.loads(self.reports[name])

    def say(self, text: str) -> None:
        self.said.append(text)

    def scores(self) -> tuple[np.ndarray, Any]:
        known = told(self, 0)  # type: ignore[arg-type]
        combined = combine_told(self, self.samples, self._rows["verdicts"], self.recipe.verifiers, known)  # type: ignore[arg-type]
        return combined.p_good, known


def test_gold_that_is_not_shown_changes_nothing(tmp_path: Path) -> None:
    recipe = make(tmp_path, prompts=5)
    truth = Round(recipe, [0.0] * 80).truth
    p_good, known = Round(recipe, truth.tolist()).scores()
    shown = np.array([f"s{i}" in known.labels for i in range(80)])
    assert shown.sum() == 20 and known.report == {
        "labels": 20, "good": int(truth[shown].sum()), "prompts": 5, "from_gold": 20, "from_file": 0,
    }  # fmt: skip
    np.testing.assert_array_equal(p_good[shown], truth[shown])
    turned = np.where(shown, truth, 1.0 - truth)
    np.testing.assert_array_equal(Round(recipe, turned.tolist()).scores()[0], p_good)
    assert not np.array_equal(Round(recipe, (1.0 - truth).tolist()).scores()[0], p_good)
    rest = unseen(truth.tolist(), Round(recipe, truth.tolist()).samples, known)
    assert [value is None for value in rest] == shown.tolist()


def test_without_labels_gold_is_not_even_read(tmp_path: Path) -> None:
    run = Round(make(tmp_path), [])
    del run._rows["gold"]
    assert run.scores()[1] is None


def test_which_prompts_are_shown_depends_on_their_names_only() -> None:
    names = [f"p{i}" for i in range(50)]
    few, more = shown_prompts(names, 5, 0), shown_prompts(names[::-1], 6, 0)
    assert len(few) == 5 and few < more and shown_prompts(names, 5, 1) != few


def test_gold_that_abstained_is_no_label(tmp_path: Path) -> None:
    samples = Round(make(tmp_path), []).samples
    assert shown_gold(
        samples, [Verdict("s0", "gold", None, "no answer"), Verdict("s1", "gold", 0.0, None)], {"p0"}
    ) == {"s1": False}


def test_a_label_file_stands_beside_the_round_and_leaves_with_it(tmp_path: Path) -> None:
    rows = tuple(Item(f"f{i}", f"q{i // 2}", "1+1=", str(i), None, 1, "stop") for i in range(10))
    file = Labelled(rows, (True, False) * 5)
    run = Round(make(tmp_path, file="labels.jsonl"), [], file)
    p_good, known = run.scores()
    assert p_good.shape == (80,) and known.report["from_file"] == 10 and known.report["labels"] == 10
    plain = Round(make(tmp_path), []).scores()[0]
    assert np.corrcoef(p_good, plain)[0, 1] > 0.5


def test_what_labels_say_of_pairs_reaches_the_pair_stage_through_the_run_s_own_records(tmp_path: Path) -> None:
    made = []
    for shown in (0, 0, 10, 10):
        recipe = make(tmp_path, prompts=shown) if shown else make(tmp_path)
        run = Round(recipe, Round(recipe, []).truth.tolist())
        _combine(run, 0, [])  # type: ignore[arg-type]
        kept = run.kept(0, "ensemble")
        pairs = _pair_responses(run, 0)[0].pairs  # type: ignore[arg-type]
        chances = {s.sample_id: s.p_good for s in run.read(0, "scores")}
        calibrated = PairProbability(kept["pair_correlation"])
        for pair in pairs:
            win, tie, _ = calibrated(chances[pair.chosen_id], chances[pair.rejected_id])
            assert (pair.p_win, pair.p_tie) == (win, tie)
        assert kept["on_gold"]["pairs"]["pairs"] > 0 and kept["on_gold"]["pairs"]["win"]["ece"] < 0.5
        made.append((kept["pair_correlation"], pairs))
    assert made[0] == made[1] and made[2] == made[3]  # a stage that is done again gives the same to the last bit
    assert made[0][0] == 0.0 and made[2][0] != 0.0
