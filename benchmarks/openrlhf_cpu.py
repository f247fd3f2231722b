"""OpenRLHF's DPO trainer on a machine without a GPU: stand-ins for what it imports and does not use here.

Its `DPOTrainer.fit`, `Actor` and `DeepspeedStrategy` run unchanged.  Replaced are packages that only a GPU or other
trainers need (flash-attn, torchdata, pylatexenc), the calls that place tensors on a GPU, its list of dtypes, which has
no float32, and DeepSpeed's own AdamW, which would have to be compiled first: torch's takes its place.

    pip install --no-deps --target DIR openrlhf==0.11.2     and DIR on PYTHONPATH
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

INSTALL = "pip install --no-deps --target DIR openrlhf==0.11.2, and DIR on PYTHONPATH"
STAND_INS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "torchdata": (),
    "torchdata.stateful_dataloader": ("StatefulDataLoader",),
    "pylatexenc": ("latex2text",),
}
"""Modules and the names that OpenRLHF imports from them."""


def absent() -> str | None:
    """Why it cannot be measured here."""
    return None if importlib.util.find_spec("openrlhf") else f"OpenRLHF is not installed ({INSTALL})"


def load() -> None:
    """Import what is measured, and make its set-up land on the CPU where there is no GPU.  Called once."""
    roots = {name.split(".")[0] for name in STAND_INS}
    missing = {root for root in roots if importlib.util.find_spec(root) is None}
    for name, things in STAND_INS.items():
        if name.split(".")[0] in missing:
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            for thing in things:
                setattr(module, thing, _unused)
            sys.modules[name] = module

    import deepspeed
    import openrlhf.trainer.dpo_trainer  # noqa: F401  before memory is counted
    import openrlhf.utils.deepspeed.deepspeed as strategy
    import openrlhf.utils.utils as utils

    given, real_mesh = utils.convert_to_torch_dtype, strategy.init_device_mesh
    utils.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else given(name)
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce for inference; this project's side leaves it out as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.cuda.set_device = lambda device: None
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.current_device = lambda: "cpu"
        strategy.init_device_mesh = lambda kind, *args, **kwargs: real_mesh("cpu", *args, **kwargs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a stand-in was called")


class Batches:
    """What its trainer takes for a data loader: says before each batch how many steps are done."""

    sampler = None

    def __init__(self, batches: Sequence[Any], after_step: Callable[[int], None]) -> None:
        self._batches, self._after_step = batches, after_step

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for done, batch in enumerate(self._batches):
            self._after_step(done)
            yield batch
        self._after_step(len(self._batches))


def train(
    model_dir: Path, batches: Sequence[Any], after_step: Callable[[int], None], settings: dict[str, float]
) -> list[float]:
    """Its trainer over the batches; `settings` has beta, learning_rate, clip and pairs."""
    from openrlhf.models import Actor
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.utils.deepspeed import DeepspeedStrategy
    from transformers import AutoTokenizer

    pairs, steps = int(settings["pairs"]), len(batches)
    args = SimpleNamespace(
        local_rank=-1,
        ds=SimpleNamespace(param_dtype="fp32", packing_samples=False, zero_stage=0, adam_offload=False, zpg=1),
        train=SimpleNamespace(batch_size=pairs, micro_batch_size=pairs, dynamic_batch_enable=False),
        model=SimpleNamespace(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.0),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=10**9),
        eval=SimpleNamespace(steps=10**9),
        ckpt=SimpleNamespace(save_steps=10**9),
    )
    strategy = DeepspeedStrategy(
        max_norm=settings["clip"], micro_train_batch_size=pairs, train_batch_size=pairs, zero_stage=0, args=args
    )
    strategy.setup_distributed()
    given = strategy.get_ds_train_config

    def with_torchs_adam(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = given(*args, **kwargs)
        if "optimizer" in config:
            config["optimizer"]["params"]["torch_adam"] = True
        return config

    strategy.get_ds_train_config = with_torchs_adam
    options = {"attn_implementation": "sdpa", "param_dtype": "fp32"}
    policy = Actor(str(model_dir), ds_config=strategy.get_ds_train_config(), **options)
    reference = Actor(str(model_dir), ds_config=strategy.get_ds_eval_config(offload=False), **options)
    adam = {"lr": settings["learning_rate"], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = {
        "optim": "adam", "adam": adam, "lr_scheduler": "constant", "lr_warmup_ratio": 0.0,
        "max_norm": settings["clip"], "scheduler_steps": steps,
    }  # fmt: skip
    (policy, optim, scheduler), reference = strategy.prepare((policy, optimizer), reference)
    losses: list[float] = []

    class Told(DPOTrainer):
        def save_logs_and_checkpoints(
            self, args: Any, step: int, bar: Any, logs: Any = None, states: Any = None
        ) -> None:
            losses.append(logs["loss"])

    trainer = Told(
        policy, reference, strategy, AutoTokenizer.from_pretrained(model_dir), optim, Batches(batches, after_step),
        None, scheduler, max_norm=settings["clip"], beta=settings["beta"], max_epochs=1,
    )  # fmt: skip
    trainer.fit(args, num_update_steps_per_epoch=steps)
    return losses
