"""The policy network: a Hugging Face causal language model that returns log-probabilities of packed responses.

Legend: R rows, S positions of a row, N response tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.errors import InputError
from align.training import attention, trunk
from align.training.exact_kl import exact_kl
from align.training.logps import HeadOptions, token_logprobs
from align.training.packing import PackedBatch

if TYPE_CHECKING:
    from align.recipe import Lora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PolicyNetwork(nn.Module):
    """What DeepSpeed wraps: packed batch in, log-probabilities of its response tokens out."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.head = Head(network.get_output_embeddings())

    def forward(self, batch: PackedBatch, options: HeadOptions) -> tuple[Tensor | None, ...]:
        """The fields of TokenLogProbs, as a tuple: DeepSpeed's hooks look for tensors in tuples."""
        return self.head(self.states(batch), batch.targets, options)

    def states(self, batch: PackedBatch) -> Tensor:
        """[N, D] the hidden state in front of every response token."""
        return trunk.states(self.network.base_model, batch)


class Head(nn.Module):
    """The output head as log-probabilities: the same parameters as the network's own, under a second module.

    A module of its own so that ZeRO-3, which gathers weights around a module's forward and backward, does so here.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.weight = projection.weight
        self.bias = projection.bias

    def forward(self, hidden: Tensor, targets: Tensor, options: HeadOptions) -> tuple[Tensor | None, ...]:
        found = token_logprobs(hidden, self.weight, self.bias, targets, options)
        kl = None
        if options.other is not None:
            kl = exact_kl(hidden, self.weight, self.bias, options.other, options.chunk)
        return found.logprobs, found.entropies, found.squares, kl


def gathered(parameters: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
    """Makes ZeRO-3 parameters whole on every rank inside the block (collective); others are whole already.

    What rank `writer` writes into them is kept.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)


def load_network(model_dir: Path, dtype: str, gradient_checkpointing: bool = False) -> Any:
    """The model in `model_dir`, with packed attention and no dropout; refuses what this project cannot compute."""
    from transformers import AutoModelForCausalLM

    attention.register()
    network = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=DTYPES[dtype], attn_implementation=attention.ATTENTION, use_safetensors=True
    )
    _refuse_unsupported(network, model_dir)
    remove_noise(network)
    if gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def remove_noise(network: nn.Module) -> None:
    """No dropout anywhere: losses compare log-probabilities, and noise in them is not wanted."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _refuse_unsupported(network: Any, model_dir: Path) -> None:
    config = network.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(
                f"{model_dir}: models that set `{key}` are not supported: their head is not plainly linear"
            )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise InputError(f"{model_dir}: only full attention is supported, and layers of this model use {sorted(kinds)}")
    if not network._supports_attention_backend:
        raise InputError(f"{model_dir}: {type(network).__name__} has its own attention, which cannot read packed rows")
    if network.get_output_embeddings() is None:
        raise InputError(f"{model_dir}: not a causal language model: it has no output head")


def add_lora(network: Any, lora: Lora, base: str) -> Any:
    """Put adapters into the network, in place, and return PEFT's view of it."""
    from peft import LoraConfig, get_peft_model

    modules = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        peft_model = get_peft_model(network, config)
    except ValueError as error:
        raise InputError(f"policy.lora.target_modules: {error}") from error
    odd = [name for name, layer in lora_layers(network) if not isinstance(layer.base_layer, nn.Linear)]
    if odd or any(layer is network.get_output_embeddings() for _, layer in lora_layers(network)):
        where = odd or "the head"
        raise InputError(f"policy.lora.target_modules: adapters go on linear layers before the head, not on {where}")
    return peft_model


def lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer that carries an adapter."""
    for name, module in network.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and without training-time noise, then go back to the mode before."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
