"""How large a model is, from its config.json alone: no weights are read and none are allocated.

The modules are built on torch's meta device, where a tensor has a shape and no storage, so the count of parameters is
exact for every architecture that transformers knows.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.model_files import check_model_dir, resolve_model
from align.recipe import Lora, Policy

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelShape:
    """The numbers that memory follows from.

    Example (Qwen3-1.7B): parameters=1_720_574_976, trainable=1_720_574_976, largest_module=311_164_928, layers=28,
    hidden=2048, ffn=6144, ffn_tensors=4, query_width=2048, kv_width=1024, head_norm=True, vocabulary=151_936,
    context=40_960
    """

    name: str  # what the recipe calls it
    parameters: int  # all of them; a tied output head is counted once
    trainable: int  # those with a gradient: the adapters with LoRA, else all
    largest_module: int  # most parameters that one module holds itself: what ZeRO-3 gathers at once
    layers: int
    hidden: int  # width of the residual stream
    ffn: int  # width of the feed-forward layer that one token goes through
    ffn_tensors: int  # ffn-wide tensors that backward needs: 4 with a gate, 2 without
    query_width: int  # heads * head_dim
    kv_width: int  # key-value heads * head_dim
    head_norm: bool  # queries and keys are normalised per head (Qwen3)
    vocabulary: int
    context: int | None  # longest sequence in tokens; None where config.json does not say


def policy_shape(policy: Policy) -> ModelShape:
    """The policy of a recipe; raises InputError where it cannot be found or is not a causal language model."""
    if policy.from_scratch is not None:
        from align.training.scratch import model_config

        return config_shape(model_config(policy.from_scratch), "policy.from_scratch", lora=policy.lora)
    assert policy.model is not None
    config = load_config(policy.model, policy.revision, key="policy.model")
    return config_shape(config, policy.model, lora=policy.lora)


def load_config(model: str, revision: str | None, *, key: str) -> Any:
    """A model's configuration; `key` is the recipe key that named it, for the error.

    Of a model on the hub only config.json is fetched; a local directory must be complete.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    local = path.is_dir() or not HUB_NAME.fullmatch(model)
    if local:
        path = resolve_model(model, revision, key=key)
        check_model_dir(path, key=key)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's concern
    try:
        return AutoConfig.from_pretrained(path if local else model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        absent = "" if local else f"no such directory in {Path.cwd()}, and the hub gave no "
        what = f"{absent}configuration" if absent else "no configuration"
        raise InputError(f"{key}: {model}: {what} that transformers can read: {first_line}") from None


def config_shape(config: Any, name: str, *, lora: Lora | None = None, classifier: bool = False) -> ModelShape:
    """Count the parameters of a configuration; `classifier` counts a reward head in place of the vocabulary's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classifier:
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except ValueError as error:
        raise InputError(f"{name}: not a model of this kind: {str(error).strip().splitlines()[0]}") from None
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    parameters = sum(p.numel() for p in model.parameters())
    modules = [module_name.rsplit(".", 1)[-1] for module_name, _ in model.named_modules()]
    return ModelShape(
        name=name,
        parameters=parameters,
        trainable=parameters if lora is None else adapter_parameters(model, lora),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=_ffn_width(text),
        ffn_tensors=4 if {"gate_proj", "gate_up_proj"} & set(modules) else 2,
        query_width=heads * head_dim,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        head_norm="q_norm" in modules,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
    )


def _ffn_width(config: Any) -> int:
    """Feed-forward width that one token goes through: all chosen experts together in a mixture of experts."""
    experts = getattr(config, "num_experts_per_tok", None)
    expert_width = getattr(config, "moe_intermediate_size", None)
    if experts and expert_width:
        return experts * expert_width
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return width * (experts or 1)


def adapter_parameters(model: Any, lora: Lora) -> int:
    """Parameters of the adapters: r * (inputs + outputs) for each linear module that gets one, as PEFT makes them.

    `all-linear` means every linear module but the output head; a string is matched against the whole module name as a
    regular expression, and a list against the name or its end.
    """
    from torch.nn import Linear

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    if lora.target_modules == "all-linear":
        chosen = [m for _, m in linear if m is not head]
    elif isinstance(lora.target_modules, str):
        chosen = [m for name, m in linear if re.fullmatch(lora.target_modules, name)]
    else:
        ends = lora.target_modules
        chosen = [m for name, m in linear if any(name == end or name.endswith("." + end) for end in ends)]
    if not chosen:
        raise InputError(f"policy.lora.target_modules: no linear module of the model matches {lora.target_modules!r}")
    return sum(lora.r * (m.in_features + m.out_features) for m in chosen)
