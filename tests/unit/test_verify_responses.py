"""`align verify RECIPE RESPONSES`: every format, prompts that stand apart, labels on evaluation prompts, bad rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.errors import InputError
from align.recipe import Recipe, Scratch
from align.training.scratch import build_tokenizer
from align.verifiers.arithmetic import Arithmetic
from align.verifiers.base import Abstain, Item, ModelVerifier
from align.verifying import responses as module
from align.verifying.rates import resampling_lines
from align.verifying.responses import verify_responses

RECIPE = """
name: check
policy: {from_scratch: {hidden_size: 32, intermediate_size: 64, layers: 1, heads: 1, kv_heads: 1, head_dim: 32}}
cold_start: {}
sampling: {max_new_tokens: 4}
prompts: {source: arithmetic, arithmetic: {digits: 1, count: 60}, eval_fraction: 0.3}
verifiers:
  - {kind: arithmetic, name: nines, check: nines}
  - {kind: arithmetic, name: parity, check: parity}
  - {kind: self_consistency, name: frequency}
  - {kind: format, name: digits, pattern: '\\d+'}
"""


@pytest.fixture
def recipe(load: Callable[..., Recipe]) -> Recipe:
    return load(RECIPE)


def rows(count: int = 10) -> list[dict[str, object]]:
    """Four responses to each prompt, two right, one off by one, one off by nine, which casting out nines cannot see."""
    found: list[dict[str, object]] = []
    for k in range(count):
        right = k + 3
        for response in (right, right, right + 1, right + 9):
            gold = int(response == right)
            found.append({"prompt": f"{k}+3=", "response": str(response), "answer": str(right), "gold": gold})
    return found


def write(path: Path, content: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def scores(out: Path) -> dict[str, float]:
    table = pq.read_table(out / "scores.parquet")
    assert table.column_names == ["item", "p_good"]
    return dict(zip(table["item"].to_pylist(), table["p_good"].to_pylist(), strict=True))


def test_every_format_gives_the_same_scores_and_report(recipe: Recipe, tmp_path: Path) -> None:
    found = []
    for ending in ("jsonl", "csv", "parquet"):
        path = write(tmp_path / f"r.{ending}", rows())
        lines = verify_responses(recipe, path, None, tmp_path / ending)
        found.append(scores(tmp_path / ending))
        assert (tmp_path / ending / "verifiers.svg").read_text().startswith("<?xml")
    assert found[0] == found[1] == found[2] and list(found[0]) == [str(i + 1) for i in range(40)]
    report = json.loads((tmp_path / "csv" / "report.json").read_text())
    nines, parity, _, digits = report["true"]["verifiers"]
    assert nines["accuracy"] == 0.75 and (nines["tpr"], nines["tnr"]) == (1.0, 0.5)  # passes right + 9
    assert parity["accuracy"] == 1.0 and digits["accuracy"] == 0.5  # + 1 and + 9 both turn odd and even round
    first = json.loads((tmp_path / "jsonl" / "report.json").read_text())
    assert all(row["seconds_per_1000"] > 0 for row in first["verifiers"])
    assert report["verifiers"][3]["seconds_per_1000"] is None  # all of it was remembered
    assert any("s/1000" in line for line in lines) and any(line.split()[-4:-3] == ["-"] for line in lines)
    table = pq.read_table(tmp_path / "csv" / "verifiers.parquet").to_pylist()
    assert table[0]["name"] == "nines" and table[0]["true_accuracy"] == 0.75 and table[0]["judged"] == 40


def test_prompts_may_stand_apart_and_chunks_do_not_matter(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(RECIPE + "ensemble: {method: mean}\n")
    content = [{**row, "item": f"r{i}"} for i, row in enumerate(rows())]
    verify_responses(recipe, write(tmp_path / "a.jsonl", content), None, tmp_path / "a")
    monkeypatch.setattr(module, "CHUNK_ITEMS", 3)
    order = np.random.default_rng(0).permutation(len(content))
    verify_responses(recipe, write(tmp_path / "b.jsonl", [content[i] for i in order]), None, tmp_path / "b")
    one, other = scores(tmp_path / "a"), scores(tmp_path / "b")
    assert list(other) == [f"r{i}" for i in order]
    assert other == pytest.approx(one)


def test_columns_are_named_and_a_missing_one_is_told(recipe: Recipe, tmp_path: Path) -> None:
    content: list[dict[str, object]] = [{"q": row["prompt"], "a": row["response"]} for row in rows()]
    path = write(tmp_path / "r.jsonl", content)
    with pytest.raises(
        InputError, match=r"r.jsonl:1: no column 'prompt'; it has 'q', 'a'; name it by --column prompt="
    ):
        verify_responses(recipe, path, None, tmp_path / "out")
    verify_responses(recipe, path, None, tmp_path / "out", ["prompt=q", "response=a"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["true"] is None
    for named, said in (
        (["promt=q"], "did you mean prompt="),
        (["gold=g"], "no column 'g'"),
        (["nonsense"], "NAME=COLUMN"),
    ):
        with pytest.raises(InputError, match=said):
            verify_responses(recipe, path, None, tmp_path / "out", ["prompt=q", "response=a", *named])


def test_the_recipes_gold_verifier_stands_in_for_a_gold_column(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load(RECIPE + "evaluation: {gold: {kind: answer, name: correct}}\n")
    content = [{k: v for k, v in row.items() if k != "gold"} for row in rows()]
    verify_responses(recipe, write(tmp_path / "r.jsonl", content), None, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["input"]["gold_from"] == "verifier correct" and report["true"]["verifiers"][0]["accuracy"] == 0.75


def test_labels_on_evaluation_prompts_are_counted_named_and_not_shown(recipe: Recipe, tmp_path: Path) -> None:
    from align.prompts import load_prompts

    prompts = load_prompts(recipe, module.load_tokenizer(recipe), None)
    held_out, train = {p.text for p in prompts.eval}, {p.text for p in prompts.train}
    chosen = [*sorted(held_out)[:2], *sorted(train)[:6]]
    content: list[dict[str, object]] = [
        {"prompt": text, "response": str(k), "gold": k % 2, "item": f"{text}{k}"} for text in chosen for k in (4, 5, 6)
    ]
    path = write(tmp_path / "r.jsonl", content)
    lines = verify_responses(recipe, path, 18, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name.split("=")[0] + "=" for name in report["labels"]["items"]} == set(chosen[2:])
    told = next(w for w in report["warnings"] if "evaluation prompts" in w)
    assert told.startswith("6 labels lie on 2 of the recipe's evaluation prompts and are not shown")
    assert all(repr(text) in told for text in chosen[:2]) and f"warning: {told}" in " ".join(" ".join(lines).split())
    with pytest.raises(InputError, match="gold that may be used on 18 items"):
        verify_responses(recipe, path, 19, tmp_path / "out")


def test_bad_rows_are_told_together(recipe: Recipe, tmp_path: Path) -> None:
    content: list[dict[str, object]] = [
        {"prompt": "1+1=", "response": "2", "gold": 2, "item": "a"},
        {"prompt": "", "response": "2", "gold": None, "item": "b"},
        {"prompt": "1+1=", "response": None, "gold": "1", "item": "c"},
        {"prompt": "1+1=", "response": "2", "gold": True, "item": "d"},
        {"prompt": "1+1=", "response": "", "gold": "", "item": "d"},
    ]
    path = write(tmp_path / "r.jsonl", content)
    with pytest.raises(InputError) as caught:
        verify_responses(recipe, path, None, tmp_path / "out")
    assert [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()] == [
        "1: gold: '2' is not 1, 0 or blank",
        "2: prompt: is empty",
        "3: response: expected text, found null",
        "5: item: 'd' stands there already; give each row its own name",
        "--column NAME=COLUMN says which column holds the prompt, response, answer, gold or item",
    ]


class Counting(ModelVerifier):
    """Stands for a model in this process: three tokens a response."""

    kind = "score"
    read = 0

    def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
        self.read += 3 * len(batch)
        return [float(len(item.response)) for item in batch]

    def account(self) -> dict[str, float]:
        return {"requests": self.read / 3, "tokens_read": float(self.read)}

    def close(self) -> None:
        pass


def test_seconds_and_tokens_are_reported(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_model", lambda recipe, spec: Counting(spec.name))
    monkeypatch.setattr(module, "CHUNK_ITEMS", 8)
    monkeypatch.setattr(module.registry, "check", lambda spec, where: ())
    recipe = load(RECIPE + "  - {kind: classifier, name: guard, model: m, label: safe}\nverdict_cache: false\n")
    lines = verify_responses(recipe, write(tmp_path / "r.jsonl", rows()), None, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verifiers"][-1]["counted"] == {"requests": 40, "tokens_read": 120}
    assert report["verifiers"][0]["counted"] == {} and report["verifiers"][0]["seconds_per_1000"] > 0
    assert "guard counted 40 requests, 120 tokens read" in lines


def test_slow_verdicts_are_remembered_from_command_to_command(load: Callable[..., Recipe], tmp_path: Path) -> None:
    path, found = write(tmp_path / "r.jsonl", rows()), []
    for number, more in enumerate(("", "", "verdict_cache: false\n")):
        out = tmp_path / f"out{number}"
        verify_responses(load(RECIPE + more), path, None, out)
        pattern = json.loads((out / "report.json").read_text())["verifiers"][-1]
        found.append((pattern["name"], pattern["counted"], scores(out)))
    assert [counted for _, counted, _ in found] == [{"remembered": 10}, {"remembered": 40}, {}]  # a text twice
    assert all(name == "digits" for name, _, _ in found)  # the others are as quick as looking up
    assert found[0][2] == found[1][2] == found[2][2]
    assert (tmp_path / "runs" / "verdict_cache.sqlite").is_file()


def test_verifiers_see_what_they_see_in_the_loop_of_a_chat_model(
    load: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Item] = []

    class Seeing(Counting):
        def verify(self, batch: Sequence[Item]) -> list[float | Abstain]:
            seen.extend(batch)
            return super().verify(batch)

    tokenizer = build_tokenizer(Scratch())
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    monkeypatch.setattr(module, "load_tokenizer", lambda recipe: tokenizer)
    monkeypatch.setattr(module, "_model", lambda recipe, spec: Seeing(spec.name))
    monkeypatch.setattr(module.registry, "check", lambda spec, where: ())
    prompts = f"prompts: {{source: '{write(tmp_path / 'p.jsonl', rows())}', chat_template: true}}"
    text = RECIPE.replace(RECIPE.splitlines()[5], prompts).replace("cold_start: {}\n", "")
    text = (
        text.replace(RECIPE.splitlines()[2], "policy: {model: m}")
        + "  - {kind: classifier, name: g, model: m, label: s}\n"
    )
    verify_responses(load(text), write(tmp_path / "r.jsonl", rows()), None, tmp_path / "out")
    assert seen[0].prompt == "<user>0+3=<assistant>" and seen[0].question == "0+3="
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["verifiers"][0]["coverage"] == 1.0
    )  # nines reads it


def test_prompts_are_clustered_by_their_answers_here_too(load: Callable[..., Recipe], tmp_path: Path) -> None:
    content = [row | {"response": "7"} if str(row["prompt"]) < "5" else row for row in rows()]  # one answer, or three
    path, found = write(tmp_path / "r.jsonl", content), []
    for clusters in (1, 2):
        recipe = load(RECIPE + f"ensemble: {{method: weaver, clusters: {clusters}}}\n")
        verify_responses(recipe, path, None, tmp_path / f"out{clusters}")
        found.append(json.loads((tmp_path / f"out{clusters}" / "report.json").read_text())["diagnostics"]["clusters"])
    assert found == [1, 2]


def test_a_verifier_that_breaks_costs_its_own_verdicts_only(recipe: Recipe, tmp_path: Path) -> None:
    content = rows(3)
    content[0] = {**content[0], "prompt": "say hello", "response": "\x00\x1b[2J" * 2000}
    verify_responses(recipe, write(tmp_path / "r.jsonl", content), None, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        report["verifiers"][0]["coverage"] == pytest.approx(11 / 12)
        and sum(report["verifiers"][0]["failures"].values()) == 1
    )
    assert len(scores(tmp_path / "out")) == 12


def test_tokens_are_counted_where_a_verifier_asks_for_them(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load(RECIPE + "  - {kind: length, name: brief, maximum: 1}\n")
    verify_responses(recipe, write(tmp_path / "r.jsonl", rows()), None, tmp_path / "out")
    brief = json.loads((tmp_path / "out" / "report.json").read_text())["verifiers"][4]
    one_digit = sum(len(str(row["response"])) == 1 for row in rows())
    assert brief["name"] == "brief" and brief["positive_rate"] == pytest.approx(one_digit / 40)


def test_a_report_tells_the_plan_where_its_rates_come_from(recipe: Recipe, tmp_path: Path) -> None:
    assert resampling_lines(recipe, None) == []
    path = write(tmp_path / "r.jsonl", rows())
    lines = verify_responses(recipe, path, None, tmp_path / "out")
    told = resampling_lines(recipe, tmp_path / "out" / "report.json")
    assert told[0].endswith(f"(rates from {tmp_path / 'out' / 'report.json'})")
    assert told[1:-1] == lines[lines.index(told[1]) :][: len(told) - 2]
    assert told[-1] == "  this recipe draws 8 responses a prompt"
    for content, said in (("{", "not JSON"), ("{}", "holds no rates"), ('{"resampling": {"tpr": 1}}', "is damaged")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=said):
            resampling_lines(recipe, tmp_path / "bad.json")


def test_what_the_table_of_verdicts_holds_is_what_the_verifiers_said(recipe: Recipe, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", rows())
    columns = module.find_columns(path, ())
    facts = module.survey(path, columns)
    table, _ = module.judge(recipe, recipe.verifiers, path, columns, facts)
    nines = Arithmetic.from_spec(recipe.verifiers[0])
    said = [nines.value(Item("s", "p", str(r["prompt"]), str(r["response"]), None, 1, "stop")) for r in rows()]
    assert table.values[:, 0].tolist() == said
    assert table.values[:4, 2].tolist() == pytest.approx([1 / 3, 1 / 3, 0.0, 0.0])  # share of the others that agree
    assert table.prompts.tolist() == [i // 4 for i in range(40)] and table.whole_prompts == (False, False, True, False)
