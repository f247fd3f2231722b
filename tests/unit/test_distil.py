"""Distillation: soft labels, split by prompt, choices worked out by hand, and a checkpoint that serves as it learnt."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.errors import InputError
from align.recipe import Scratch
from align.training.scratch import create_model
from reward_models.distil import Example, Material, default_base, distil, merged, selection, split, teach
from reward_models.scorer import Fitting, Lesson, _batches, _losses, encode, fit, lessons, make_scorer, save, score

SHAPE = Scratch(hidden_size=32, intermediate_size=64, layers=2, heads=1, kv_heads=1, context=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    create_model(folder, SHAPE, 0)
    return folder


def examples(prompts: int) -> list[Example]:
    """Two responses to each prompt, "c" good and "r" bad, in the ensemble's eyes with p 0.9 and 0.2."""
    return [
        Example(f"0/p{i}", f"p{i}", f"{i}=", r, p, float(r == "c"))
        for i in range(prompts)
        for r, p in (("c", 0.9), ("r", 0.2))
    ]


def material(rows: list[Example]) -> Material:
    """The first half to learn from, the rest held out."""
    return Material(rows[: len(rows) // 2], rows[len(rows) // 2 :], None)


def test_a_prompt_is_never_on_both_sides() -> None:
    learnt, asked = split(examples(200) + examples(200))
    assert len(learnt) + len(asked) == 800 and 40 < len(asked) < 140
    assert not {e.prompt_id for e in learnt} & {e.prompt_id for e in asked}


def test_equal_responses_are_one_with_their_mean() -> None:
    rows = merged([Example("0/p", "p", "1=", r, p, None) for r, p in (("c", 0.9), ("r", 0.2), ("c", 0.6))])
    assert [(e.response, e.p_good) for e in rows] == [("c", 0.75), ("r", 0.2)]


def test_choices_by_hand() -> None:
    rows = [
        Example("a", "a", "", "", 0.9, 1.0), Example("a", "a", "", "", 0.1, 0.0),
        Example("b", "b", "", "", 0.5, 1.0), Example("b", "b", "", "", 0.5, 0.0),  # the ensemble ties: half right
        Example("c", "c", "", "", 0.9, 1.0),  # no choice
        Example("d", "d", "", "", 0.9, None), Example("d", "d", "", "", 0.1, 0.0),  # not judged
    ]  # fmt: skip
    found = selection(rows, [0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    assert (found.prompts, found.student, found.ensemble, found.first, found.best) == (2, 0.5, 0.75, 0.5, 1.0)
    assert found.retained == pytest.approx(2 / 3) and found.judged_by == "gold"
    blind = selection([Example("a", "a", "", "", p, None) for p in (0.9, 0.2)], [1.0, 0.0])
    assert (blind.student, blind.best, blind.judged_by) == (0.9, 0.9, "the ensemble itself")
    judge = selection(rows, [0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 1.0], gold=False)
    assert (judge.student, judge.ensemble) == (pytest.approx((0.1 + 0.5 + 0.1) / 3), pytest.approx(2.3 / 3))
    with pytest.raises(InputError, match="two responses"):
        selection(rows[4:5], [0.0])


def test_soft_labels_are_learnt_as_they_are_and_the_checkpoint_serves_the_same(base: Path, tmp_path: Path) -> None:
    """The minimum of the cross-entropy with p is at the logit of p: 2.2 and -1.4."""
    rows = examples(120)
    settings = Fitting(epochs=12, batch_size=16, learning_rate=3e-3, pair_weight=0.0, patience=12)
    model, tokenizer, report = teach(material(rows), base, settings)
    found = score(model, encode(tokenizer, [e.text for e in rows]))
    assert sum(found[::2]) / 120 == pytest.approx(math.log(9), abs=0.4)
    assert sum(found[1::2]) / 120 == pytest.approx(math.log(0.25), abs=0.4)
    assert report["selection"]["student"] == report["selection"]["retained"] == 1.0 and report["too_long"] == 0
    assert report["losses"][-1] < report["losses"][0] and len(report["checks"]) == 12
    save(model, tokenizer, tmp_path)
    from align.verifiers.reward_model import check_scorer

    check_scorer(tmp_path, "key")
    again, its_own = make_scorer(tmp_path)
    assert score(again, encode(its_own, [e.text for e in rows])) == pytest.approx(found, abs=1e-5)


def test_the_losses_of_a_step_by_hand(base: Path) -> None:
    """Cross-entropy at the last token, its mean over the response, and the one comparison, on its own logits."""
    model, tokenizer = make_scorer(base)
    given = lessons(tokenizer, [("12=", "34", 0.9, "p"), ("12=", "5", 0.2, "p"), ("7=", "8", 0.5, "q")])
    assert [lesson.begins for lesson in given] == [3, 3, 2]
    ids = given[0].ids

    def at(tokens: tuple[int, ...]) -> float:
        return score(model, [tokens])[0]

    def cost(x: float, p: float) -> float:
        return p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x))

    ends = [at(lesson.ids) for lesson in given]
    last = sum(cost(x, p) for x, p in zip(ends, (0.9, 0.2, 0.5), strict=True)) / 3
    tokens = ((cost(at(ids[:4]), 0.9) + cost(ends[0], 0.9)) / 2 + cost(ends[1], 0.2) + cost(ends[2], 0.5)) / 3
    wins, losses = 0.9 * 0.8, 0.2 * 0.1
    pair = cost(ends[0] - ends[1], wins / (wins + losses))
    found, total = _losses(model, given, pair_weight=2.0)
    assert found == pytest.approx(last, abs=1e-5) and total.item() == pytest.approx(last + tokens + 2 * pair, abs=1e-5)
    alone = _losses(model, given[2:], pair_weight=2.0)[1].item()
    assert alone == pytest.approx(2 * cost(ends[2], 0.5), abs=1e-5), "with nothing to compare there is no such loss"


def test_the_best_epoch_is_kept_and_training_stops_when_it_gains_no_more(base: Path) -> None:
    model, tokenizer = make_scorer(base)
    given = lessons(tokenizer, [("1=", "c", 0.9, "1"), ("2=", "r", 0.1, "2")])
    says, seen = iter((0.1, 0.5, 0.5, 0.2, 0.3, 0.9)), list[float]()

    def check() -> float:
        seen.append(score(model, [given[0].ids])[0])
        return next(says)

    fitted = fit(model, given, Fitting(epochs=9, learning_rate=1e-2, patience=3), check)
    assert fitted.checks == (0.1, 0.5, 0.5, 0.2, 0.3) and fitted.kept == 3 and len(fitted.losses) == 5
    assert score(model, [given[0].ids])[0] == pytest.approx(seen[2], abs=1e-5) != seen[4]


def test_prompts_are_not_parted_and_every_response_is_taught_once_in_an_epoch(base: Path) -> None:
    given = [Lesson((1, 2), 1, 0.5, f"p{i % 7}") for i in range(40)]
    one, other = (_batches(given, Fitting(batch_size=8), epoch) for epoch in (0, 1))
    assert sorted(i for rows in one for i in rows) == list(range(40)) and one != other
    assert all(len(rows) >= 8 for rows in one[:-1])
    assert all({i for i in range(40) if i % 7 == r % 7} <= set(rows) for rows in one for r in rows)


def test_the_score_does_not_depend_on_the_batch(base: Path) -> None:
    model, tokenizer = make_scorer(base, layers=1)
    inputs = encode(tokenizer, ["1=c", "123=rrr", "7=", "1=c"])
    together, alone = score(model, inputs), [score(model, [ids])[0] for ids in inputs]
    assert together == pytest.approx(alone, abs=1e-5) and len(model.model.layers) == 1  # type: ignore[union-attr, arg-type]


def test_the_same_seed_gives_the_same_weights(base: Path) -> None:
    weights = []
    for _ in range(2):
        model, tokenizer = make_scorer(base, seed=3)
        given = lessons(tokenizer, [("1=", "c", 0.9, "1"), ("2=", "r", 0.1, "2")])
        fit(model, given, Fitting(epochs=2), lambda: 0.0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_what_is_too_long_is_counted_and_never_picked(base: Path) -> None:
    long = [Example(f"0/p{i}", f"p{i}", f"{i}=", "c" * 20, 0.9, 1.0) for i in range(40)]
    learnt = len(split(long)[0])
    report = teach(Material([*examples(40), *long], [*examples(40), *long], None), base, Fitting(epochs=1))[2]
    assert report["too_long"] == learnt + 40 and 0 < learnt < 40
    with pytest.raises(InputError, match="every response is longer"):
        teach(Material(long, examples(4), None), base, Fitting(epochs=1))
    with pytest.raises(InputError, match="no response to learn from"):
        teach(Material([], examples(4), None), base, Fitting(epochs=1))


def test_a_model_that_reads_both_ways_learns_from_the_last_label_alone(tmp_path: Path) -> None:
    """An encoder has no logit for a prefix: the loss is the cross-entropy once, and it falls."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    from align.training.scratch import build_tokenizer

    tokenizer = build_tokenizer(SHAPE)
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1,
        sep_token_id=1, global_attn_every_n_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = teach(material(examples(120)), tmp_path, Fitting(epochs=8, batch_size=16, learning_rate=1e-3))[2]
    assert report["losses"][-1] < report["losses"][0] - 0.1 and report["selection"]["retained"] == 1.0


def test_the_default_base_is_the_trained_policy_where_there_is_a_whole_one(tmp_path: Path) -> None:
    def run(export: Path | None) -> Any:
        store = SimpleNamespace(verify_directory={"export": export}.get)
        return SimpleNamespace(store=store, model_dir=lambda: tmp_path / "start")

    assert default_base(run(None)) == tmp_path / "start", "not exported yet"
    (tmp_path / "adapter_config.json").touch()
    assert default_base(run(tmp_path)) == tmp_path / "start", "an adapter is no model"
    (tmp_path / "config.json").touch()
    assert default_base(run(tmp_path)) == tmp_path


def test_layers_that_are_not_there_are_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"--layers 3: .* has 2"):
        make_scorer(base, layers=3)


def test_a_base_with_pickled_weights_is_refused_before_anything_is_read(tmp_path: Path, base: Path) -> None:
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be opened")
    store = SimpleNamespace(root=tmp_path, verify_directory=lambda name: None)
    run: Any = SimpleNamespace(store=store)
    with pytest.raises(InputError, match=r"--base: .* pickle only \(pytorch_model.bin\)"):
        distil(run, str(tmp_path), None, Fitting())
