"""The learning curve: reads what is there, tolerates what is not, and gives the same bytes for the same numbers."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from align.curve import Series, _lead, _small_panels, _spread, draw, learning_curve, read_series
from align.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


def estimate(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def write_run(root: Path, rounds: dict[int, dict[str, Any]], **ensembles: Any) -> Path:
    for index, metrics in rounds.items():
        directory = root / "rounds" / f"{index:05d}"
        directory.mkdir(parents=True)
        (directory / "evaluation.json").write_text(json.dumps(metrics))
        (directory / "ensemble.json").write_text(json.dumps(ensembles))
    (root / "summary.json").write_text(json.dumps({"name": "tried", "seconds": {"total": 83.4}}))
    return root


def full_run(root: Path) -> Path:
    rounds = {
        i: {
            "accuracy": estimate(0.3 + 0.1 * i),
            "pass@1": estimate(0.3 + 0.1 * i),
            "pass@4": estimate(0.5 + 0.1 * i),
            "kl": estimate(0.8 * i),
            "length": estimate(4.0),
            "verifier/nines": estimate(0.4 + 0.1 * i),
            "verifier/coin": estimate(0.5),
        }
        for i in range(4)
    }
    return write_run(root, rounds, p_good=0.6)


def test_series_are_what_the_rounds_say(tmp_path: Path) -> None:
    found = read_series(full_run(tmp_path))
    assert found["accuracy"] == Series(
        "accuracy",
        rounds=(0, 1, 2, 3),
        value=pytest.approx((0.3, 0.4, 0.5, 0.6)),
        low=pytest.approx((0.25, 0.35, 0.45, 0.55)),
        high=pytest.approx((0.35, 0.45, 0.55, 0.65)),
    )
    assert found["p_good"].value == (0.6,) * 4 and found["p_good"].low == (0.6,) * 4  # no interval given


def test_missing_and_broken_points_are_left_out(tmp_path: Path) -> None:
    rounds = {
        0: {"accuracy": estimate(0.2), "kl": None, "note": "text", "flag": True},
        2: {"accuracy": estimate(float("nan")), "kl": estimate(1.0), "p_good": estimate(0.7)},
        4: {"accuracy": estimate(0.4)},
    }
    found = read_series(write_run(tmp_path, rounds))
    assert found["accuracy"].rounds == (0, 4)
    assert found["kl"].rounds == (2,)
    assert found["p_good"].high == pytest.approx((0.75,))
    assert set(found) == {"accuracy", "kl", "p_good"}


def test_p_good_is_read_from_the_scores_where_no_report_has_it(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    run = write_run(tmp_path, {0: {"accuracy": estimate(0.2)}, 1: {"accuracy": estimate(0.3)}})
    for shard, values in enumerate(([0.25, 0.75], [0.8])):
        table = arrow.table({"sample_id": [str(v) for v in values], "p_good": values})
        parquet.write_table(table, run / "rounds" / "00000" / f"scores-{shard:05d}.parquet")
    found = read_series(run)["p_good"]
    assert found.rounds == (0,) and found.value == pytest.approx((0.6,))  # (0.25 + 0.75 + 0.8) / 3


def test_coverage_has_a_panel_only_where_something_abstained(tmp_path: Path) -> None:
    metrics = {"accuracy": estimate(0.2), "coverage/a": estimate(1.0, 0.0), "coverage/b": estimate(0.9)}
    assert _small_panels(read_series(write_run(tmp_path, {0: metrics}))) == ["coverage/b"]


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    first = learning_curve(run).read_bytes()
    learning_curve(run, format="png")  # another picture in between changes nothing
    assert learning_curve(run).read_bytes() == first


def test_the_picture_is_inert_and_complete(tmp_path: Path) -> None:
    path = learning_curve(full_run(tmp_path))
    assert path == tmp_path / "learning_curve.svg"
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    tags = {element.tag for element in root.iter()}
    assert not tags & {f"{SVG}script", f"{SVG}a", f"{SVG}image", f"{SVG}foreignObject"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            assert not name.endswith("href") or value.startswith("#")  # only within the file
    assert not list(tmp_path.glob("*.tmp"))


def test_every_metric_has_a_place(tmp_path: Path) -> None:
    figure = draw(read_series(full_run(tmp_path)), title="tried")
    titles = {axes.get_title(loc="left") or axes.get_title() for part in figure.subfigs for axes in part.axes}
    assert {"nines", "coin", "pass@4", "length", "KL to the reference"} <= titles
    assert "pass@1" not in titles  # it repeats the accuracy


def test_text_that_looks_like_mathematics_is_drawn_as_text(tmp_path: Path) -> None:
    """matplotlib reads `$…$` as TeX and would fail on half of it."""
    run = write_run(tmp_path, {0: {"accuracy": estimate(0.5), "verifier/a$b$\\frac": estimate(0.5)}})
    (run / "summary.json").write_text(json.dumps({"name": "$\\undefined$"}))
    assert learning_curve(run).stat().st_size > 1000


def test_a_run_without_gold_shows_what_it_has(tmp_path: Path) -> None:
    run = write_run(tmp_path, {0: {"verifier/words": estimate(0.1)}, 1: {"verifier/words": estimate(0.2)}})
    assert learning_curve(run).is_file()


def test_a_gold_score_leads_alone_and_the_proxy_gets_a_panel(tmp_path: Path) -> None:
    rounds = {i: {"gold/vader": estimate(0.05 * i), "kl": estimate(0.1 * i), "length": estimate(90)} for i in range(3)}
    found = read_series(write_run(tmp_path, rounds, p_good=0.5))
    assert [(one.name, label) for one, label, _ in _lead(found)] == [("gold/vader", "vader (gold),\nheld-out prompts")]
    assert _small_panels(found) == ["p_good", "length"]
    assert learning_curve(tmp_path).is_file()


def test_labels_of_lines_that_end_together_are_moved_apart() -> None:
    one = Series("a", (0, 1), (0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
    two = Series("b", (0, 1), (0.0, 0.99), (0.0, 0.99), (0.0, 0.99))
    high, low = _spread([1.0, 0.99], [(one, "a", ""), (two, "b", "")])
    assert high - low == pytest.approx(0.24) and (high + low) / 2 == pytest.approx(0.995)
    assert _spread([1.0, 0.2], [(one, "a", ""), (two, "b", "")]) == pytest.approx([1.0, 0.2])


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_run_without_an_evaluation_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "rounds" / "00000").mkdir(parents=True)
        (tmp_path / "rounds" / "00000" / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match="no rounds/.*evaluation.json with a metric yet; run `align evaluate` first"):
        learning_curve(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    (run / "rounds" / "00002" / "evaluation.json").write_text('{"accuracy": ')
    with pytest.raises(InputError, match=r"00002.evaluation\.json: not JSON"):
        learning_curve(run)
