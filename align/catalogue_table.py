"""The README's tables of losses, printed from the catalogue: `python -m align.catalogue_table` writes them into it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from align.catalogue import ALGORITHMS, FAMILIES, LOSSES, Family, LossFacts

BEGIN, END = "<!-- losses: printed by `python -m align.catalogue_table README.md` -->", "<!-- end of losses -->"
TITLES: dict[Family, str] = {
    "preference": "Pairs",
    "group": "Scored groups",
    "negative": "Wrong responses",
    "policy_gradient": "Policy gradients",
    "supervised": "Supervised relatives",
}


def loss_tables() -> str:
    """One table a family: name, formula, paper, what it needs, which settings it reads."""
    parts = []
    for family in FAMILIES:
        names = [a.name for a in ALGORITHMS.values() if a.family == family]
        rows = [_row(facts) for facts in LOSSES.values() if facts.family == family]
        if rows:
            head = "| loss | formula | paper | needs | settings |\n|---|---|---|---|---|"
            said = ", ".join(f"`{name}`" for name in names)
            parts.append(f"**{TITLES[family]}** (`algorithm`: {said})\n\n{head}\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _row(facts: LossFacts) -> str:
    needs = ["reference"] if facts.reference else []
    if facts.family == "preference" and not facts.soft:
        needs.append("`pairs.labels: hard`")
    if facts.whole_step:
        needs.append("a first pass over the step")
    if facts.needs:
        needs.append(f"`{facts.needs}`" if facts.needs.replace(".", "").replace("_", "").isalpha() else facts.needs)
    paper = facts.paper
    if re.fullmatch(r"\d{4}\.\d{5}", paper):
        paper = f"[{paper}](https://arxiv.org/abs/{paper})"
    settings = ", ".join(f"`{option}`" for option in facts.options)
    formula = facts.formula.replace("|", "\\|")
    return f"| `{facts.name}` | `{formula}` | {paper} | {', '.join(needs)} | {settings} |"


def written_into(text: str) -> str:
    """A README with its tables as the catalogue has them now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{loss_tables()}\n\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(written_into(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
    if not sys.argv[1:]:
        print(loss_tables())
