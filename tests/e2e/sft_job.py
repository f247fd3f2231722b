"""A rank of the cold-start tests: `python sft_job.py JOB`, JOB a JSON object {model, recipe, out}.

Each rank writes report.RANK.json (what cold_start returned, and what it left behind) and weights.RANK.safetensors
into `out`; rank 0's checkpoint goes to out/model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from align.distributed import close, connect
from align.errors import AlignError
from align.prompts import load_prompts
from align.recipe import Recipe
from align.training import sft


def main(job: dict[str, Any]) -> None:
    ranks = connect(deadline_s=120)
    recipe, out, model_dir = Recipe.model_validate(job["recipe"]), Path(job["out"]), Path(job["model"])
    train = sft._train

    def train_and_keep(model: Any, *rest: Any) -> Any:
        losses = train(model, *rest)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, out / f"weights.{ranks.rank}.safetensors")
        return losses

    sft._train = train_and_keep
    report: dict[str, Any] = {}
    try:
        prompts = load_prompts(recipe, AutoTokenizer.from_pretrained(model_dir), 64)
        report = dict(sft.cold_start(model_dir, recipe, prompts, out / "model", ranks))
    except AlignError as error:
        report = {"error": str(error)}
    report["group"] = torch.distributed.is_initialized()
    (out / f"report.{ranks.rank}.json").write_text(json.dumps(report))
    close(ranks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
