"""The README.md of an exported model: what it was made from, how, how well it does, and what is not known of it.

Nothing that a model wrote goes in.  The recipe goes in by an allow-list: names and numbers stay, a local path keeps
its last part only, and free-form engine settings keep their numbers only, so neither a home directory nor a token
that somebody put in the wrong place is published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from align.progress import clean
from align.recipe import Recipe
from align.recipe_supervised import CONDITIONED

LEFT_OUT = "(left out)"
PATH_KEYS = frozenset({"model", "file", "negative_file", "source", "output_dir"})
"""Recipe keys whose text may be a local path."""
FREE_KEYS = frozenset({"engine", "deepspeed"})
"""Recipe keys that hold another program's settings."""
SETTING = re.compile(r"fp8(_e[45]m[23])?|auto|bfloat16|float16|float32|cpu|none")
"""Words that are published as they are among another program's settings."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def model_card(recipe: Recipe, *, summary: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter, made offline.

    `summary` is what summary.json will hold (`evaluation`, `verifiers`, `versions`, `rounds`, `tokens`); `data` is
    the record of the prompts: their digest and counts.
    """
    parts = [
        _front_matter(recipe),
        f"# {escape(recipe.name)}",
        _introduction(recipe, summary),
        "## Use",
        _use(recipe),
        "## Evaluation",
        _evaluation(recipe, summary.get("evaluation", {})),
        "## Supervision",
        _supervision(recipe, summary),
        "## Data",
        _facts(data, ("what", "value")),
        "## Limitations",
        "\n".join(f"- {line}" for line in limitations(recipe, summary)),
        "## How it was made",
        _facts(summary.get("versions", {}), ("package", "version")),
        "The recipe; local paths keep their last part only.",
        _fenced(yaml.safe_dump(public_recipe(recipe), sort_keys=False, width=110)),
    ]
    return "\n\n".join(parts) + "\n"


def escape(text: object) -> str:
    """Text that Markdown and HTML show as it is: on one line, no control characters, no markup.

    Example: escape("<b>[x](y)") == "&lt;b&gt;\\\\[x\\\\]\\\\(y\\\\)"
    """
    line = " ".join(clean(str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", line)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without anything that belongs to one machine or one person."""
    settings = recipe.model_dump(mode="json")
    settings.pop("output_dir")
    return _public(settings)


def _public(value: Any, key: str = "", *, foreign: bool = False) -> Any:
    """`foreign` is true inside another program's settings, where text is left out unless it is a known word."""
    if isinstance(value, Mapping):
        return {k: _public(v, str(k), foreign=foreign or key in FREE_KEYS) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_public(v, key, foreign=foreign or key in FREE_KEYS) for v in value]
    if not isinstance(value, str):
        return value
    if foreign:
        return value if SETTING.fullmatch(value) else LEFT_OUT
    return public_name(value) if key in PATH_KEYS else clean(value)


def public_name(text: str) -> str:
    """A hub name or a plain word as it is; of a path its last part.

    Example: public_name("/data/me/gsm8k.jsonl") == "gsm8k.jsonl"; public_name("Qwen/Qwen3-1.7B") is unchanged.
    """
    if text.startswith("hub:") or (HUB_NAME.fullmatch(text) and ".." not in text):
        return clean(text)
    return clean(PurePath(text.replace("\\", "/")).name) or LEFT_OUT


def _front_matter(recipe: Recipe) -> str:
    """What the hub reads; a base model only where it has a name there."""
    model = recipe.policy.model
    algorithm = recipe.training.algorithm
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if model is not None and HUB_NAME.fullmatch(model):
        found["base_model"] = model
    if recipe.prompts.source.startswith("hub:"):
        found["datasets"] = [recipe.prompts.source.split(":")[1]]
    found["tags"] = ["align", algorithm, "preference-optimization", "on-policy", "weak-supervision"]
    return f"---\n{yaml.safe_dump(found, sort_keys=False)}---"


def _introduction(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    policy, training, rounds = recipe.policy, recipe.training, recipe.rounds
    base = "a model trained from random weights" if policy.model is None else escape(public_name(policy.model))
    revision = f" (revision {escape(policy.revision)})" if policy.revision else ""
    how = f"LoRA adapters of rank {policy.lora.r}" if policy.lora else "all weights"
    export = {"merge": "merged into the weights", "keep": "kept as an adapter"}[recipe.export.lora]
    pairs = "preference pairs made of their combined judgement"
    learnt = pairs if training.trainer.consumes == "pairs" else "their combined judgement of each response"
    lines = [
        f"Aligned from {base}{revision} by {summary.get('rounds', rounds.count)} rounds of on-policy "
        f"{escape(training.algorithm)}{_loss(recipe)}: the model "
        f"answers, {len(recipe.verifiers)} verifiers judge, and the model learns from "
        f"{learnt}. Trained: {how}" + (f", {export}." if policy.lora else "."),
    ]
    lesson = summary.get("cold_start") or {}
    if lesson.get("examples"):
        wrong = lesson.get("wrong_examples", 0)
        lines.append(
            f"Before the rounds it was fine-tuned on {lesson['examples']:,} solutions "
            f"({lesson.get('tokens', 0):,} tokens)" + (f", {wrong:,} of them wrong on purpose." if wrong else ".")
        )
    tokens = summary.get("tokens", {})
    if tokens:
        counts = ", ".join(f"{int(n):,} tokens {escape(what)}" for what, n in tokens.items())
        lines.append(f"In all {counts}.")
    return "\n".join(lines)


def _loss(recipe: Recipe) -> str:
    """The loss with the settings it reads, where there is more to say than the algorithm's name."""
    facts, settings = recipe.training.loss_facts, recipe.training.loss
    values = {option: getattr(settings, option) for option in facts.options}
    told = [f"{option} {value}" for option, value in values.items() if value is not None]
    name = [] if facts.name == recipe.training.algorithm else [f"{facts.name} loss"]
    return f" ({escape(', '.join([*name, *told]))})" if name or told else ""


def _use(recipe: Recipe) -> str:
    behind = ""
    if recipe.training.loss_facts.name in CONDITIONED:
        text = escape(recipe.training.supervised.control[-1])
        behind = f"Put `{text}` in front of every prompt: the figures below were measured behind it.\n\n"
    return behind + (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'directory = "path/to/this/directory"\n'
        "tokenizer = AutoTokenizer.from_pretrained(directory)\n"
        "model = AutoModelForCausalLM.from_pretrained(directory)\n"
        "```"
    )


def _evaluation(recipe: Recipe, evaluation: Mapping[str, Any]) -> str:
    """Before and after, with intervals."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    settings = recipe.evaluation
    head = (
        f"Up to {settings.prompts} prompts kept out of training, {settings.samples_per_prompt} responses each at "
        f"temperature {settings.temperature:g}; {settings.confidence:.0%} intervals from {settings.bootstrap} "
        "bootstrap resamples of the prompts."
    )
    names = [n for n in {**after, **before} if not _full_coverage(n, before, after)]
    rows = [(escape(name), _interval(before.get(name)), _interval(after.get(name))) for name in names]
    return head + "\n\n" + (_table(("metric", "before", "after"), rows) if rows else "Nothing was measured.")


def _full_coverage(name: str, *evaluations: Mapping[str, Any]) -> bool:
    """Whether a metric only says that every verdict was given."""
    values = [e[name].get("value") for e in evaluations if isinstance(e.get(name), Mapping)]
    return "coverage" in name and all(value == 1.0 for value in values)


def _interval(estimate: Any) -> str:
    if not isinstance(estimate, Mapping) or estimate.get("value") is None:
        return "not measured"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def _supervision(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """One row a verifier: what it is, and what the ensemble made of it in the last round.

    Only Dawid-Skene estimates how reliable a verifier is; under the other methods the column would mislead.
    """
    found = summary.get("verifiers", {})
    used = [e["method"] for e in summary.get("ensemble") or () if e]
    method = used[-1] if used else recipe.ensemble.method
    estimates = method == "dawid_skene"
    rows = []
    for spec in recipe.verifiers:
        seen = found.get(spec.name) or {}
        abstained = seen.get("abstained") or {}
        count = sum(abstained.values()) if isinstance(abstained, Mapping) else abstained
        rows.append(
            (
                escape(spec.name),
                escape(spec.kind),
                escape(spec.family or ""),
                _number(seen.get("accuracy")) if estimates else "",
                _number(seen.get("coverage")),
                str(count),
            )
        )
    gold = recipe.evaluation.gold
    told = (
        "No gold verifier was named."
        if gold is None
        else f"Gold, for reports only and never in training: {escape(gold.name)} ({escape(gold.kind)})."
    )
    head = ("verifier", "kind", "family", "estimated accuracy", "coverage", "abstained")
    how = f"Combined by {escape(method)}."
    how += " Accuracies are estimated without labels, in the last round." if estimates else ""
    on_gold = [e["on_gold"]["explain"] for e in summary.get("ensemble") or () if e and e.get("on_gold")]
    if on_gold:
        how += f" First round: {escape(on_gold[0])}. Last round: {escape(on_gold[-1])}."
    return f"{_table(head, rows)}\n\n{how} {told}"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def limitations(recipe: Recipe, summary: Mapping[str, Any]) -> list[str]:
    """What the recipe and the figures themselves say about what is not known."""
    found = summary.get("verifiers", {})
    gold, names = recipe.evaluation.gold, [v.name for v in recipe.verifiers]
    lines = [
        f"Supervision came from {len(names)} automatic verifier{'s' if len(names) > 1 else ''} "
        f"({escape(', '.join(names))}), not from people. The model learned what they reward, their errors too.",
    ]
    if gold is None:
        lines.append(
            "No gold verifier was used, so whether the model is better, or only scores better, was not measured."
        )
    else:
        lines.append(
            f"The gold verifier {escape(gold.name)} was not used in training or to combine the verifiers; the "
            "evaluation above is as good as that verifier."
        )
    spoiled = [v.name for v in recipe.verifiers if v.kind == "noise" or v.flip_rate > 0]
    if spoiled:
        lines.append(f"Bad on purpose, to study bad supervision: {escape(', '.join(spoiled))}.")
    poor = [n for n in names if isinstance((found.get(n) or {}).get("accuracy"), float) and found[n]["accuracy"] < 0.5]
    if poor:
        lines.append(f"Estimated to be wrong more often than right: {escape(', '.join(poor))}.")
    families = [v.family for v in recipe.verifiers if v.family]
    shared = sorted({f for f in families if families.count(f) > 1})
    if shared:
        lines.append(
            f"Verifiers of one family err together ({escape(', '.join(shared))}); their agreement is weak evidence."
        )
    after = (summary.get("evaluation") or {}).get("after") or {}
    kl = after.get("kl")
    if isinstance(kl, Mapping) and kl.get("value") is not None:
        lines.append(f"The policy moved {kl['value']:.3g} nats per response from its reference on held-out prompts.")
    lines.append(
        f"Responses were at most {recipe.sampling.max_new_tokens} tokens long in training and evaluation; longer ones "
        "were not seen."
    )
    if recipe.prompts.source == "arithmetic":
        lines.append("Trained and evaluated on the built-in arithmetic task only.")
    lines.append("Nothing beyond the metrics above was measured: not safety, bias, truthfulness or other languages.")
    return lines


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of tildes inside it, so that the text cannot close it."""
    fence = "~" * max(4, 1 + max((len(run) for run in re.findall("~+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}"


def _facts(values: Mapping[str, Any], head: tuple[str, str]) -> str:
    """A table of names and plain values; nested values are spelled out with dots."""
    rows = [(escape(name), escape(_shown(value))) for name, value in _flat(values)]
    return _table(head, rows) if rows else "Not recorded."


def _shown(value: Any) -> str:
    """Numbers with separators; text by its last part where it is a path."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return public_name(value) if isinstance(value, str) and ("/" in value or "\\" in value) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
