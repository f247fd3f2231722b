"""Distillation: soft labels, split by prompt, choices worked out by hand, and a checkpoint that serves as it learnt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from align.errors import InputError
from align.recipe import Scratch
from align.training.scratch import create_model
from reward_models.distil import Example, selection, split, teach
from reward_models.scorer import Fitting, encode, fit, make_scorer, save, score

SHAPE = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=1, kv_heads=1, context=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    create_model(folder, SHAPE, 0)
    return folder


def examples(prompts: int) -> list[Example]:
    """Two responses to each prompt, "c" good and "r" bad, in the ensemble's eyes with p 0.9 and 0.2."""
    return [
        Example(f"0/p{i}", f"p{i}", f"{i}={r}", p, float(r == "c"))
        for i in range(prompts)
        for r, p in (("c", 0.9), ("r", 0.2))
    ]


def test_a_prompt_is_never_on_both_sides() -> None:
    train, held_out = split(examples(200) + examples(200))
    assert len(train) + len(held_out) == 800 and 80 < len(held_out) < 240
    assert not {e.prompt_id for e in train} & {e.prompt_id for e in held_out}


def test_choices_by_hand() -> None:
    rows = [
        Example("a", "a", "", 0.9, 1.0), Example("a", "a", "", 0.1, 0.0),
        Example("b", "b", "", 0.5, 1.0), Example("b", "b", "", 0.5, 0.0),  # the ensemble ties: half right
        Example("c", "c", "", 0.9, 1.0),  # no choice
        Example("d", "d", "", 0.9, None), Example("d", "d", "", 0.1, 0.0),  # not judged
    ]  # fmt: skip
    found = selection(rows, [0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert (found.prompts, found.student, found.ensemble, found.first, found.best) == (2, 0.5, 0.75, 0.5, 1.0)
    assert found.retained == pytest.approx(2 / 3) and found.judged_by == "gold"
    blind = selection([Example("a", "a", "", p, None) for p in (0.9, 0.2)], [1.0, 0.0])
    assert (blind.student, blind.best, blind.judged_by) == (0.9, 0.9, "the ensemble itself")
    with pytest.raises(InputError, match="two responses"):
        selection(rows[4:5], [0.0])


def test_soft_labels_are_learnt_as_they_are_and_the_checkpoint_serves_the_same(base: Path, tmp_path: Path) -> None:
    """The minimum of the cross-entropy with p is at the logit of p: 2.2 and -1.4."""
    rows = examples(60)
    model, tokenizer, report = teach(rows, base, Fitting(epochs=12, batch_size=16, learning_rate=3e-3))
    found = score(model, encode(tokenizer, [e.text for e in rows]))
    assert sum(found[::2]) / 60 == pytest.approx(math.log(9), abs=0.4)
    assert sum(found[1::2]) / 60 == pytest.approx(math.log(0.25), abs=0.4)
    assert report["selection"]["student"] == report["selection"]["retained"] == 1.0 and report["too_long"] == 0
    save(model, tokenizer, tmp_path)
    from align.verifiers.reward_model import check_scorer

    check_scorer(tmp_path, "key")
    again, its_own = make_scorer(tmp_path)
    assert score(again, encode(its_own, [e.text for e in rows])) == pytest.approx(found, abs=1e-5)


def test_the_score_does_not_depend_on_the_batch(base: Path) -> None:
    model, tokenizer = make_scorer(base, layers=1)
    inputs = encode(tokenizer, ["1=c", "123=rrr", "7=", "1=c"])
    together, alone = score(model, inputs), [score(model, [ids])[0] for ids in inputs]
    assert together == pytest.approx(alone, abs=1e-5) and len(model.model.layers) == 1  # type: ignore[union-attr, arg-type]


def test_the_same_seed_gives_the_same_weights(base: Path) -> None:
    weights = []
    for _ in range(2):
        model, tokenizer = make_scorer(base, seed=3)
        fit(model, encode(tokenizer, ["1=c", "2=r"]), [0.9, 0.1], Fitting(epochs=2))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_what_is_too_long_is_counted_and_never_picked(base: Path) -> None:
    rows = [*examples(40), *(Example(f"0/p{i}", f"p{i}", f"{i}={'c' * 20}", 0.9, 1.0) for i in range(40))]
    report = teach(rows, base, Fitting(epochs=1))[2]
    assert report["too_long"] == 40
    with pytest.raises(InputError, match="every response is longer"):
        teach(rows[80:], base, Fitting(epochs=1))


def test_layers_that_are_not_there_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"--layers 3: .* has 2"):
        make_scorer(base, layers=3)
