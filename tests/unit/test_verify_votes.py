"""`align verify --votes`: the file as arrays, what is refused and in which words, and that unseen gold goes nowhere."""

from __future__ import annotations

import gzip
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.ensemble.combine import combine
from align.errors import InputError, RunError
from align.recipe import Ensemble
from align.verify import verify_votes
from align.verifying import votes as votes_module
from align.verifying.labels import choose_labels
from align.verifying.votes import ADVICE, read_votes

ROOT = Path(__file__).parents[2]
SMALL = "item,group,gold,judge,judge#swap,rm~\na,q,1,1,0,2.5\nb,q,0,,1,-1e3\nc,,,0,0,\n"
PANDALM = ROOT.parent / "shared" / "data" / "verifier_matrices" / "pandalm_3class.csv.gz"
NAN = math.nan


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "v.csv") -> Path:
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def matrix(rows: int = 60, seed: int = 0, flip: frozenset[int] = frozenset()) -> str:
    """Votes of five verifiers on groups of four; `flip` turns the gold of those rows round."""
    rng = np.random.default_rng(seed)
    gold = rng.random(rows) < 0.5
    votes = np.where(rng.random((rows, 5)) < [0.9, 0.8, 0.75, 0.7, 0.6], gold[:, None], ~gold[:, None]).astype(int)
    lines = ["item,group,gold,a,b,c,d,e"]
    for i in range(rows):
        said = ["" if rng.random() < 0.1 else str(v) for v in votes[i]]
        lines.append(f"i{i},g{i // 4},{int(gold[i] != (i in flip))},{','.join(said)}")
    return "\n".join(lines) + "\n"


# ---- what a file says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        SMALL.encode(),
        b"\xef\xbb\xbf" + SMALL.encode(),
        SMALL.replace("\n", "\r\n").encode(),
        SMALL.replace("judge", '"judge"', 1).replace("a,q", '"a","q"').encode(),
        SMALL.replace(",1,1,0,2.5", ",1.0, 1 ,0.0,+2.50").encode(),
        SMALL.replace("b,q", "\nb,q").encode(),
        gzip.compress(SMALL.encode()),
    ],
    ids=["plain", "byte-order mark", "carriage returns", "quoted", "1.0 and blanks", "a blank line", "gzip"],
)
def test_every_spelling_of_a_file_gives_the_same_arrays(write: Callable[..., Path], content: bytes) -> None:
    found = read_votes(write(content, "v.csv"))
    assert found.items.to_pylist() == ["a", "b", "c"]
    assert found.names == ("judge", "judge#swap", "rm")
    assert found.kinds == ("binary", "binary", "score")
    np.testing.assert_array_equal(found.gold, [1, 0, NAN])
    np.testing.assert_array_equal(found.values, [[1, 0, 2.5], [NAN, 1, -1000], [0, 0, NAN]])
    assert found.groups.tolist() == [0, 0, 2]  # the blank group is number 1, which nobody has


def test_a_file_read_in_many_chunks_is_the_same(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(matrix())
    whole = read_votes(path)
    monkeypatch.setattr(votes_module, "CHUNK_ROWS", 7)
    parts = read_votes(path)
    np.testing.assert_array_equal(parts.values, whole.values)
    np.testing.assert_array_equal(parts.groups, whole.groups)
    assert parts.items.to_pylist() == whole.items.to_pylist()


def test_columns_may_stand_in_any_order_and_hold_any_text(write: Callable[..., Path]) -> None:
    text = '=1+1,gold,"a, ""b""",item,group\n1,0,0,"=cmd|\'/c calc\'!A1","line\nend"\n,1,1,@SUM(A1),q\n'
    found = read_votes(write(text))
    assert found.names == ("=1+1", 'a, "b"') and found.items.to_pylist() == ["=cmd|'/c calc'!A1", "@SUM(A1)"]
    np.testing.assert_array_equal(found.values, [[1, 0], [NAN, 1]])


def test_a_vote_and_a_score_may_share_a_name(write: Callable[..., Path]) -> None:
    found = read_votes(write("item,group,gold,length,length~,rm~\n1,,,1,7,0.5\n"))
    assert found.names == ("length", "length~", "rm") and found.kinds == ("binary", "score", "score")


# ---- what is refused -----------------------------------------------------------------------------------------------


BAD = {
    "": "is empty; its first line must name the columns item, group, gold, …",
    "item,group,gold,a\n": "the header stands alone; give at least one row",
    "item;group;gold;a\n1;1;1;1\n": ":1: the columns are separated by ';'; separate them by commas",
    "item,group,gold\n1,1,1\n": ":1: no verifier; add a column for each behind item, group, gold",
    "Item,group,a\n1,1,1\n": ":1: no column 'item'; did you mean it by 'Item'?",
    "item,group,a\n1,1,1\n": ":1: no column 'gold'; add it (gold may be blank)",
    "item,group,gold,a,a\n1,1,1,1,1\n": ":1: 2 columns are named 'a'; give each a name of its own",
    "item,group,gold,\n1,1,1,1\n": ":1: column 4 has no name; name it, or remove it",
    "item,group,gold,a\n1,1,1,1\n2,1,1\n": ":3: has 3 fields, the header names 4; quote a text",
    "item,group,gold,a\n1,1,1,1\n1,1,1,0\n": ":3: item: '1' stands on line 2 already; give each row a name",
    "item,group,gold,a\n,1,1,1\n": ":2: item: is blank; every row needs a name of its own",
    "item,group,gold,a\n1,1,1,yes\n": ":2: a: 'yes' is not 1 or 0",
    "item,group,gold,a\n1,1,1,0.5\n": ":2: a: '0.5' is not 1 or 0",
    "item,group,gold,a\n1,1,1,nan\n": ":2: a: 'nan' is not 1 or 0",
    "item,group,gold,a\n1,1,2,1\n": ":2: gold: '2' is not 1 or 0",
    "item,group,gold,a~\n1,1,1,inf\n": ":2: a~: 'inf' is not a finite number; leave it blank where there is none",
    "item,group,gold,a~\n1,1,1,1e999\n": ":2: a~: '1e999' is not a finite number",
    "item,group,gold,a~\n1,1,1,1_0\n": ":2: a~: '1_0' is not a finite number",
    "item,group,gold,a,b\n1,1,1,,\n2,1,0,,\n": "every vote is blank; at least one verifier must say something",
    'item,group,gold,a\n1,1,1,"1\n2,1,1,1\n': ":2: not valid CSV: ",
    "item,group,gold,a\nb\xe9,1,1,1\n": ":2: byte 2 is not UTF-8; save the file as UTF-8",
    "\ufeffitem,group,gold,a\n": ":1: the file is UTF-16; save it as UTF-8",
}


@pytest.mark.parametrize("content", BAD, ids=[said[:40] for said in BAD.values()])
def test_bad_input_is_named_by_line_and_column(write: Callable[..., Path], content: str) -> None:
    coding = "latin-1" if "\xe9" in content else "utf-16-le" if content.startswith("\ufeff") else "utf-8"
    path = write(content.encode(coding))
    with pytest.raises(InputError) as caught:
        read_votes(path)
    assert caught.value.exit_code == 2
    said = str(caught.value).splitlines()[0]
    assert said.startswith(f"{path}{'' if BAD[content].startswith(':') else ': '}{BAD[content]}")


def test_all_faults_are_told_at_once(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("item,group,gold,a,b~\nx,1,1,2,1\nx,1,maybe,1,nan\ny,1\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError) as caught:
        verify_votes(path, None, tmp_path / "full")
    assert str(caught.value).splitlines() == [
        f"--out {tmp_path / 'full'}: holds 'thesis.tex'; name a new directory, or one that holds nothing but an "
        "earlier result",
        f"{path}:4: has 2 fields, the header names 5; quote a text that holds a comma, and keep the commas of blank "
        "votes",
        f"{path}:3: gold: 'maybe' is not 1 or 0",
        f"{path}:2: a: '2' is not 1 or 0",
        f"{path}:3: b~: 'nan' is not a finite number; leave it blank where there is none",
        f"{path}:3: item: 'x' stands on line 2 already; give each row a name of its own",
        ADVICE,
    ]


def test_many_faults_are_counted(write: Callable[..., Path]) -> None:
    path = write("item,group,gold,a\n" + "".join(f"{i},,,7\n" for i in range(90)))
    with pytest.raises(InputError, match="… and 70 more rows"):
        read_votes(path)


def test_three_classes_are_refused_and_the_advice_can_be_followed(write: Callable[..., Path], tmp_path: Path) -> None:
    """One row for each item and class: the likeliest class of each item is then its best row."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 90)
    said = [[g if rng.random() < 0.8 else (g + 1) % 3 for _ in "abcd"] for g in truth.tolist()]
    classes = "".join(f"{i},,{truth[i]},{','.join(map(str, row))}\n" for i, row in enumerate(said))
    with pytest.raises(InputError) as caught:
        read_votes(write("item,group,gold,a,b,c,d\n" + classes))
    assert ": '2' is not 1 or 0" in str(caught.value) and str(caught.value).endswith(ADVICE)
    assert "one row for each item and class, its vote 1 where the verifier named that class" in ADVICE
    lines = [
        f"{i}-{k},{i},{int(truth[i] == k)},{','.join(str(int(vote == k)) for vote in row)}"
        for i, row in enumerate(said)
        for k in range(3)
    ]
    path = write("\n".join(["item,group,gold,a,b,c,d", *lines]))
    verify_votes(path, None, tmp_path / "out")
    p_good = pq.read_table(tmp_path / "out" / "scores.parquet")["p_good"].to_numpy().reshape(90, 3)
    assert (p_good.argmax(axis=1) == truth).mean() > 0.85


@pytest.mark.skipif(not PANDALM.is_file(), reason="the shared data is not here")
def test_a_real_matrix_of_three_classes_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        read_votes(PANDALM)
    first, *_, last = str(caught.value).splitlines()
    assert first.startswith(f"{PANDALM}:") and first.endswith("'2' is not 1 or 0") and last == ADVICE


def test_lines_are_right_behind_a_field_with_line_ends(write: Callable[..., Path]) -> None:
    path = write('item,group,gold,a\n"two\nlines",,1,1\nb,,1,9\n')
    with pytest.raises(InputError, match=f"{path.name}:4: a: '9' is not 1 or 0"):
        read_votes(path)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "at least 2"), (1, "at least 2"), (-5, "at least 2"), (3, "on 2 items")]
)
def test_a_number_of_labels_that_cannot_be(write: Callable[..., Path], tmp_path: Path, count: int, said: str) -> None:
    with pytest.raises(InputError, match=f"--labels {count}: .*{said}"):
        verify_votes(write(SMALL), count, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:40] + b"\xff" * 20 + b[60:]])
def test_a_damaged_gzip_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "v.csv.gz"
    path.write_bytes(damage(gzip.compress(matrix(400).encode())))
    with pytest.raises(InputError, match="cut short or damaged"):
        read_votes(path)


def test_places_that_are_no_file_or_no_directory(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="is a directory"):
        read_votes(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        read_votes(tmp_path / "absent.csv")
    path = write(SMALL)
    with pytest.raises(InputError, match="is a file; name a directory"):
        verify_votes(path, None, path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a link to nothing"):
        verify_votes(path, None, tmp_path / "link")


# ---- labels and leaks ----------------------------------------------------------------------------------------------


def chosen(items: list[str], groups: list[str], count: int) -> list[str]:
    rows = choose_labels(
        pa.chunked_array([pa.array(items)]), pa.chunked_array([pa.array(groups)]), np.ones(len(items), bool), count, "f"
    )
    return [items[i] for i in rows]


def test_labels_are_spread_over_groups_and_do_not_hang_on_the_order_of_the_file() -> None:
    items, groups = [f"i{k}" for k in range(40)], [f"g{k // 8}" for k in range(40)]
    five = chosen(items, groups, 5)
    assert sorted(groups[items.index(name)] for name in five) == ["g0", "g1", "g2", "g3", "g4"]
    assert set(chosen(items[::-1], groups[::-1], 5)) == set(five)
    assert set(five) < set(chosen(items, groups, 6)) < set(chosen(items, groups, 20))


def test_a_blank_group_is_a_group_of_its_own() -> None:
    assert set(chosen(["a", "b", "c", "d"], ["", "", "", "q"], 4)) == {"a", "b", "c", "d"}
    names = [f"i{k}" for k in range(30)]
    spread = chosen(names + ["x", "y"], [""] * 30 + ["q", "q"], 31)  # 31 groups: one of x and y must be left
    assert len({"x", "y"} & set(spread)) == 1


@pytest.mark.parametrize("labels", [None, 8])
def test_gold_that_is_not_shown_changes_nothing_but_the_true_part(
    write: Callable[..., Path], tmp_path: Path, labels: int | None
) -> None:
    verify_votes(write(matrix()), labels, tmp_path / "one")
    one = json.loads((tmp_path / "one" / "report.json").read_text())
    seen = {int(name[1:]) for name in one["labels"]["items"]}
    assert len(seen) == (labels or 0)
    other = write(matrix(flip=frozenset(range(60)) - seen), "other.csv")
    verify_votes(other, labels, tmp_path / "two")
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (tmp_path / "one" / "scores.parquet").read_bytes() == (tmp_path / "two" / "scores.parquet").read_bytes()
    assert one.pop("true") != two.pop("true")
    for report in (one, two):
        del report["input"]["sha256"], report["input"]["file"]
    assert one == two


def test_the_same_command_gives_the_same_bytes_and_may_be_given_again(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(matrix(), "v.csv.gz")
    found = []
    for _ in range(2):
        verify_votes(path, 6, tmp_path / "out", plot=True)
        found.append({f.name: f.read_bytes() for f in sorted((tmp_path / "out").iterdir())})
    assert found[0] == found[1]
    assert list(found[0]) == ["report.json", "scores.parquet", "verifiers.parquet", "verifiers.svg"]


# ---- what is written -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_ensemble_and_the_prior_where_nobody_spoke(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(matrix() + "silent,,,,,,,\n")
    lines = verify_votes(path, None, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.column_names == ["item", "p_good"]
    combined = combine(read_votes(path).table(), Ensemble())
    assert table["item"].to_pylist() == [*(f"i{k}" for k in range(60)), "silent"]
    expected = np.append(combined.p_good[:60], combined.class_balance)
    np.testing.assert_array_equal(table["p_good"].to_numpy(), expected)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["unjudged"] == 1 and report["method"] == combined.method and report["why"] == combined.why
    said = f"no verifier said anything of 1 items: their P(good) is the class balance, {combined.class_balance:.3f}"
    assert said in report["warnings"] and f"warning: {said}" in " ".join(" ".join(lines).split())
    assert [row["name"] for row in report["verifiers"]] == ["a", "b", "c", "d", "e"]
    assert report["verifiers"][0]["accuracy"] == combined.estimates[0].accuracy


def test_a_full_disk_leaves_no_half_file(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(matrix())
    monkeypatch.setenv("ALIGN_FAULT", "verify.report.mid_write=ENOSPC")
    with pytest.raises(RunError, match="No space left"):
        verify_votes(path, None, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["scores.parquet"]
    monkeypatch.delenv("ALIGN_FAULT")
    verify_votes(path, None, tmp_path / "out")
    assert (tmp_path / "out" / "report.json").exists()


# ---- the command line ----------------------------------------------------------------------------------------------

BLOCK_HEAVY = """
import sys
for name in ("torch", "vllm", "deepspeed", "trl", "peft", "transformers", "datasets", "matplotlib"):
    sys.modules[name] = None
from align.cli import main
main()
"""


def align(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_HEAVY, *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_needs_nothing_heavy_and_starts_at_once(write: Callable[..., Path], tmp_path: Path) -> None:
    """1.5 s of processor time is the bound; wall time would measure what else the machine does."""
    path = write(matrix(), "v.csv.gz")
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = align("verify", "--votes", path.name, "--labels", "8", "--out", "out", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"align verify --votes: {min(seconds):.2f} s")
    assert min(seconds) < 1.5
    assert "60 items in 15 groups, 5 verifiers; gold on 60, shown to the ensemble: 8" in done.stdout
    assert "on the 52 items with gold that the ensemble did not see" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--votes", "v.csv"), "--out: name a directory for the result"),
        (("--out", "o"), "give --votes FILE, or RECIPE and RESPONSES"),
        (("r.yaml", "--out", "o"), "give --votes FILE, or RECIPE and RESPONSES"),
        (("r.yaml", "x.jsonl", "--votes", "v.csv", "--out", "o"), "--votes takes the place of RECIPE and RESPONSES"),
        (("--votes", "v.csv", "--column", "gold=g", "--out", "o"), "--column: a file of votes has fixed names"),
        (("r.yaml", "x.jsonl", "--plot", "--out", "o"), "--plot: with RECIPE and RESPONSES it is always drawn"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = align("verify", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(said) and not done.stdout


def test_hostile_names_reach_the_terminal_and_the_picture_as_text(write: Callable[..., Path], tmp_path: Path) -> None:
    name = "\x1b[2J</text><script>alert(1)</script>$\\frac{1}{2}$\u202e"
    path = write(f"item,group,gold,{name},b,c\n" + "".join(f"{i},,{i % 2},{i % 2},{i % 2},1\n" for i in range(8)))
    done = align("verify", "--votes", path.name, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\u202e" not in done.stdout
    verify_votes(path, None, tmp_path / "out", plot=True)
    picture = (tmp_path / "out" / "verifiers.svg").read_text()
    assert "<script" not in picture and "<!ENTITY" not in picture and 'href="http' not in picture
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verifiers"][0]["name"] == name
