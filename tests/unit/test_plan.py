"""The plan against numbers worked out by hand, DeepSpeed's own estimators, PEFT, and what autograd really keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from align import plan as plan_module
from align.errors import InputError
from align.machine import Machine, imagined
from align.memory import (
    batch_tokens,
    cold_start_parts,
    kv_bytes_per_token,
    layer_activation_bytes,
    memory_parts,
    state_parts,
)
from align.model_shape import ModelShape, config_shape
from align.plan import Plan, make_plan, render
from align.prompts import PromptSet
from align.recipe import Lora, Pairs, Recipe
from align.recipe_training import Training
from align.records import Prompt

GIB = 2**30
TEST_ROWS, TEST_ROW = 4, 128
QWEN3_1_7B = dict(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
)
# embedding 151936 * 2048; a layer: queries and output 2 * 2048^2, keys and values 2 * 2048 * 1024, head norms 2 * 128,
# feed-forward 3 * 2048 * 6144, norms 2 * 2048; the last norm 2048.
EMBEDDING = 151_936 * 2048
LAYER = 2 * 2048**2 + 2 * 2048 * 1024 + 256 + 3 * 2048 * 6144 + 4096
PARAMETERS = EMBEDDING + 28 * LAYER + 2048
SMALL = dict(vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=3, max_position_embeddings=512)


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return config_shape(Qwen3Config(**QWEN3_1_7B), "Qwen3-1.7B")


def recipe(**blocks: Any) -> Recipe:
    """A small recipe; each keyword replaces keys of the block of that name."""
    base: dict[str, Any] = {
        "name": "test",
        "policy": {"from_scratch": {"context": 64}, "dtype": "float32"},
        "cold_start": {"steps": 10, "batch_size": 32},
        "prompts": {"source": "arithmetic"},
        "sampling": {"samples_per_prompt": 8, "max_new_tokens": 8, "prompts_per_shard": 64},
        "verifiers": [
            {"kind": "arithmetic", "name": "nines", "check": "nines"},
            {"kind": "noise", "name": "coin"},
        ],
        "pairs": {"builder": "top_bottom", "k": 2},
        "training": {"pairs_per_step": 128, "epochs": 2, "tokens_per_batch": 512},
        "rounds": {"count": 5, "prompts_per_round": 100},
        "evaluation": {"prompts": 40, "samples_per_prompt": 4, "every": 2, "gold": {"kind": "answer", "name": "gold"}},
    }
    for name, keys in blocks.items():
        base[name] = {**base[name], **keys} if isinstance(keys, dict) else keys
    return Recipe.model_validate(base)


def prompt_set(train: int = 200, held_out: int = 30, tokens: int = 8) -> PromptSet:
    def some(count: int, split: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{split}{i}", "1+1=", (5,) * tokens, "2", split) for i in range(count))

    return PromptSet(some(train, "train"), some(held_out, "eval"), "digest", {})


def machine(kind: str = "cpu", memory: int = 32 * GIB, host: int = 64 * GIB) -> Machine:
    if kind == "cpu":
        return Machine("cpu", "CPU", 0, 1, memory, memory, memory, memory)
    return Machine("cuda", "GPU", 8, 8, memory, memory, host, host)


def parts_of(settings: Recipe, shape: ModelShape, where: Machine, ranks: int = 1) -> dict[str, Any]:
    found = memory_parts(settings, shape, [], where, ranks=ranks, longest=1024, context=2048)
    return {part.name: part for part in found}


# ---- the model -------------------------------------------------------------------------------------------------


def test_a_full_size_model_is_counted_exactly(qwen: ModelShape) -> None:
    assert PARAMETERS == 1_720_574_976
    assert qwen.parameters == qwen.trainable == PARAMETERS
    assert qwen.largest_module == EMBEDDING
    assert (qwen.query_width, qwen.kv_width, qwen.context) == (2048, 1024, 40_960)


def test_a_reward_head_replaces_the_vocabulary() -> None:
    shape = config_shape(Qwen3Config(**QWEN3_1_7B), "reward", classifier=True)
    assert shape.parameters == PARAMETERS + 2048  # the body keeps its embedding, and one output of width 2048 is added


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
        LlamaConfig(**SMALL, num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=False),
        MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4),
        GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    ],
    ids=lambda c: c.model_type,
)
def test_the_count_is_that_of_the_real_model(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert config_shape(config, "x").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), r".*layers\.[01]\..*v_proj"])
def test_adapters_are_counted_as_peft_makes_them(targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**SMALL, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    modules = targets if isinstance(targets, str) else list(targets)
    wanted = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    peft_model = get_peft_model(AutoModelForCausalLM.from_config(config), wanted)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert config_shape(config, "x", lora=Lora(r=4, target_modules=targets)).trainable == trainable


def test_adapters_that_match_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"policy\.lora\.target_modules: no linear module .*qproj"):
        config_shape(LlamaConfig(**SMALL, num_attention_heads=4), "x", lora=Lora(target_modules=("qproj",)))


# ---- states ------------------------------------------------------------------------------------------------------


def states(shape: ModelShape, place: str, ranks: int, dtype: str = "bfloat16", **training: Any) -> int:
    """ZeRO-3 gathers one module at a time here, as DeepSpeed's estimators take it."""
    one = {"zero_optimization": {"stage3_max_live_parameters": 1}}
    found = state_parts(Training(**training, deepspeed=one), shape, dtype, ranks)
    return sum(part.bytes for part in found if part.place == place)


def test_states_by_hand(qwen: ModelShape) -> None:
    """bf16, ZeRO-2, 8 ranks: 2 P on every rank; of 6 P of gradients and 12 P of optimizer an eighth."""
    found = {p.name: p.bytes for p in state_parts(Training(zero_stage=2), qwen, "bfloat16", 8)}
    assert found == {
        "weights": 2 * PARAMETERS,
        "gradients": 6 * PARAMETERS // 8,
        "optimizer": 12 * PARAMETERS // 8,
    }


def test_float32_without_zero_needs_no_master_copy(qwen: ModelShape) -> None:
    assert states(qwen, "device", 1, "float32") == (4 + 4 + 8) * PARAMETERS
    assert states(qwen, "device", 2, "float32", zero_stage=1) == (4 + 4) * PARAMETERS + 6 * PARAMETERS


def test_half_precision_starts_at_stage_1_as_the_trainer_does(qwen: ModelShape) -> None:
    assert states(qwen, "device", 4) == states(qwen, "device", 4, zero_stage=1)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_zero_2_agrees_with_deepspeed(qwen: ModelShape, ranks: int) -> None:
    _, gpu = estimate_zero2_model_states_mem_needs(PARAMETERS, ranks, 1, cpu_offload=False)
    assert states(qwen, "device", ranks, zero_stage=2) == pytest.approx(gpu, abs=4)
    _, gpu = estimate_zero2_model_states_mem_needs(PARAMETERS, ranks, 1, cpu_offload=True)
    assert states(qwen, "device", ranks, zero_stage=2, offload="optimizer") == gpu


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_zero_3_agrees_with_deepspeed(qwen: ModelShape, ranks: int) -> None:
    def estimate(**offload: bool) -> tuple[int, int, int]:
        return estimate_zero3_model_states_mem_needs(PARAMETERS, EMBEDDING, ranks, 1, **offload)

    _, gpu, _ = estimate(cpu_offload=False, cpu_offload_params=False)
    assert states(qwen, "device", ranks, zero_stage=3) == pytest.approx(gpu, abs=4)
    cpu, gpu, _ = estimate(cpu_offload=True, cpu_offload_params=False)
    assert states(qwen, "device", ranks, zero_stage=3, offload="optimizer") == pytest.approx(gpu, abs=4)
    # DeepSpeed adds half as much again for buffers; ours is per rank
    assert 1.5 * ranks * states(qwen, "host", ranks, zero_stage=3, offload="optimizer") == pytest.approx(cpu, rel=1e-6)
    cpu, gpu, _ = estimate(cpu_offload=True, cpu_offload_params=True)
    assert states(qwen, "device", ranks, zero_stage=3, offload="all") == gpu
    assert 1.5 * ranks * states(qwen, "host", ranks, zero_stage=3, offload="all") == pytest.approx(cpu, rel=1e-6)


def test_zero_3_keeps_gathered_weights_for_the_backward_pass(qwen: ModelShape) -> None:
    """Up to 10^9 whole parameters by DeepSpeed's default, which its estimators leave out; never more than there are."""
    found = {p.name: p.bytes for p in state_parts(Training(zero_stage=3), qwen, "bfloat16", 8)}
    assert found["gathered weights"] == 2 * 10**9 < 2 * PARAMETERS
    small = config_shape(LlamaConfig(**SMALL, num_attention_heads=4), "x")
    found = {p.name: p.bytes for p in state_parts(Training(zero_stage=3), small, "bfloat16", 8)}
    assert found["gathered weights"] == 2 * small.parameters


# ---- activations, logits, cache ------------------------------------------------------------------------------------


def kept_by_autograd(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that backward keeps of one packed batch beside the weights, response tokens of the batch)."""
    from align.training.attention import ATTENTION, register
    from align.training.logps import HeadOptions
    from align.training.model import PolicyNetwork
    from align.training.packing import Group, lay_out, plan_batches

    register()
    network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION).train()
    groups = [Group(tuple(range(1, 33)), (tuple(range(1, 49)), tuple(range(2, 50)))) for _ in range(TEST_ROWS)]
    [batch] = [lay_out(groups, plan) for plan in plan_batches(groups, TEST_ROWS * TEST_ROW)]
    assert batch.input_ids.shape == (TEST_ROWS, TEST_ROW)
    known = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, *_ = PolicyNetwork(network)(batch, HeadOptions(64))
    assert logprobs.requires_grad
    return sum(s.nbytes() for s in kept.values()), batch.targets.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
        LlamaConfig(**SMALL, num_attention_heads=8, num_key_value_heads=4, head_dim=32),
    ],
    ids=lambda c: c.model_type,
)
def test_activations_are_what_autograd_keeps(config: Any, dtype: torch.dtype) -> None:
    """At most 10% below: the estimate leaves out log-sums, norms' scales, rotary tables and indices.

    And at most 15% above: it counts all of the last layer, of which only the positions before a response are computed.
    """
    measured, responses = kept_by_autograd(config, dtype)
    shape, b, tokens = config_shape(config, "x"), dtype.itemsize, TEST_ROWS * TEST_ROW
    estimate = tokens * (shape.layers * layer_activation_bytes(shape, b, "cpu") + shape.hidden * (4 + 2 * b))
    estimate += tokens * TEST_ROW * b  # the mask
    estimate += responses * shape.hidden * b  # what goes through the head
    assert 0.9 * measured < estimate < 1.15 * measured


def test_cache_and_logits_by_hand(qwen: ModelShape) -> None:
    assert kv_bytes_per_token(qwen, 2) == 2 * 28 * 1024 * 2 == 114_688
    settings = recipe(policy={"dtype": "bfloat16"}, training={"logit_chunk_tokens": 256, "tokens_per_batch": 4096})
    found = parts_of(settings, qwen, machine("cuda", 80 * GIB))
    assert found["logits"].bytes == 256 * 151_936 * 4 * 3 + 151_936 * 2048 * 6
    # the sampler takes 0.3 of the device, weights included
    assert found["sampler KV cache"].bytes == int(0.3 * 80 * GIB) - 2 * PARAMETERS
    explicit = recipe(policy={"dtype": "bfloat16"}, sampling={"engine": {"kv_cache_memory_bytes": 114_688_000}})
    cache = parts_of(explicit, qwen, machine("cuda", 80 * GIB))["sampler KV cache"]
    assert cache.bytes == 114_688_000 and "room for 1,000 tokens of 114,688 bytes" in cache.formula


def test_a_batch_holds_one_group_at_least_and_a_steps_pairs_at_most() -> None:
    small = {"pairs_per_step": 4, "tokens_per_batch": 10_000}
    # prompt 100, response 8: a pair 116, the four paired responses of top_bottom with k=2 make a row of 132
    assert batch_tokens(recipe(training=small), ranks=1, longest=108) == (4 * 116, 132)
    assert batch_tokens(recipe(training=small), ranks=2, longest=108) == (2 * 116, 132)
    assert batch_tokens(recipe(training={"tokens_per_batch": 50}), ranks=1, longest=108) == (116, 116)


@pytest.mark.parametrize(
    "part, change",
    [
        ("activations", {"training": {"gradient_checkpointing": True}}),
        ("activations", {"training": {"tokens_per_batch": 2048}}),
        ("logits", {"training": {"logit_chunk_tokens": 64}}),
        ("optimizer", {"training": {"zero_stage": 1}}),
        ("gradients", {"training": {"zero_stage": 2}}),
        ("weights", {"training": {"zero_stage": 3}}),
        ("reference", {"training": {"zero_stage": 3}}),
        ("attention mask", {"training": {"tokens_per_batch": 2048}}),
        ("sampler KV cache", {"sampling": {"engine": {"kv_cache_memory_bytes": 1_000_000}}}),
    ],
)
def test_each_knob_makes_its_part_smaller(part: str, change: dict[str, Any]) -> None:
    shape = config_shape(LlamaConfig(**SMALL, num_attention_heads=4), "x")
    base = {"training": {"tokens_per_batch": 4096}}
    merged = {k: {**base.get(k, {}), **change.get(k, {})} for k in {*base, *change}}
    before = parts_of(recipe(**base), shape, machine(), ranks=4)[part]
    after = parts_of(recipe(**merged), shape, machine(), ranks=4)[part]
    assert after.bytes < before.bytes
    assert any(key in before.knob or "KV" in part for block in change.values() for key in block)


def test_the_cold_start_trains_all_weights_in_float32_whatever_the_recipe_trains() -> None:
    """A recipe with adapters in bf16 fits its rounds and not its cold start: 16 bytes a parameter, with DDP 20."""
    config = LlamaConfig(**SMALL, num_attention_heads=4)
    adapted = config_shape(config, "x", lora=Lora(r=2))
    settings = recipe(policy={"lora": {"r": 2}, "dtype": "bfloat16"})
    for ranks, each in ((1, 16), (2, 20)):
        parts = cold_start_parts(settings, adapted, machine("cuda"), ranks=ranks, longest=16)
        states = sum(p.bytes for p in parts if p.name in ("weights", "gradients", "optimizer"))
        assert states == each * adapted.parameters
    [logits] = [p for p in parts if p.name == "logits"]
    assert logits.bytes == 256 * 500 * 4 * 3  # 16 of 32 rows a rank, 16 tokens each
    without = recipe(cold_start=None, policy={"model": "x", "from_scratch": None})
    assert cold_start_parts(without, adapted, machine(), ranks=1, longest=16) == ()


def test_adapters_need_no_reference_and_little_optimizer() -> None:
    config = LlamaConfig(**SMALL, num_attention_heads=4)
    adapted = config_shape(config, "x", lora=Lora(r=2))
    found = parts_of(recipe(policy={"lora": {"r": 2}}), adapted, machine())
    assert "reference" not in found
    assert found["optimizer"].bytes == 8 * adapted.trainable < 8 * adapted.parameters / 10


def test_a_reference_that_moves_is_a_second_copy() -> None:
    shape = config_shape(LlamaConfig(**SMALL, num_attention_heads=4), "x")
    frozen, both = (
        parts_of(recipe(training={"reference_sync": sync}), shape, machine())["reference"].bytes for sync in (None, {})
    )
    assert both == 2 * frozen > 0


# ---- the whole plan ------------------------------------------------------------------------------------------------


def tiny_plan(**blocks: Any) -> Plan:
    return make_plan(recipe(**blocks), ranks=2, prompts=prompt_set(), machine=machine())


def test_stages_by_hand() -> None:
    """100 prompts of 8 tokens, 8 samples of at most 8 tokens, 2 verifiers and gold; up to 2 x 2 pairs a prompt."""
    stages = {stage.name: stage for stage in tiny_plan().stages}
    assert list(stages) == ["cold start", "evaluate", "sample", "verify", "combine", "pair", "train", "sync", "export"]
    assert stages["sample"].counts == {"prompts": 100, "samples": 800, "tokens sampled": 6400}
    assert stages["verify"].counts == {"verdicts": 2400}
    assert stages["pair"].counts == {"pairs": 400}
    # two epochs of ceil(400 / 128) steps; a pair is a prompt and two responses
    assert stages["train"].counts == {"pairs": 800, "steps": 8, "tokens trained": 800 * 24}
    # before rounds 0, 2 and 4, and after the last; only 30 prompts are held out
    assert stages["evaluate"].times == 4
    assert stages["evaluate"].counts["samples"] == 30 * 4
    assert stages["cold start"].counts == {"examples": 320, "steps": 10, "tokens trained": 320 * 16}


def test_the_samples_of_a_pre_flight_by_hand() -> None:
    """30 prompts are held out, 16 samples each of at most 8 tokens; gold judges alone, or the two verifiers do."""
    look = {"prompts": 40, "samples_per_prompt": 16}
    for judge, voters in (("gold", 1), ("ensemble", 2)):
        block: Any = {"preflight": {**look, "judge": judge}}
        plan = tiny_plan(training=Training(algorithm="nsr", negative=block), pairs=Pairs())
        stages = {stage.name: stage for stage in plan.stages}
        assert list(stages)[1:4] == ["evaluate", "pre-flight", "sample"] and stages["pre-flight"].times == 1
        expected = {"prompts": 30, "samples": 480, "tokens sampled": 3840, "verdicts": 480 * voters}
        assert stages["pre-flight"].counts == expected
        assert plan.total("tokens sampled") == 5 * 6400 + 4 * 120 * 8 + 3840
    off: Any = {"preflight": {"mode": "off"}}
    plain = tiny_plan(training=Training(algorithm="nsr", negative=off), pairs=Pairs())
    assert "pre-flight" not in [stage.name for stage in plain.stages]


def test_first_passes_over_a_step_by_hand() -> None:
    """Two epochs: KTO's 100 prompts of 8 and 800 responses of 8 tokens a second and a third time, for policy and
    reference; Dr. DPO's 400 pairs of 24 tokens a second time; DPO's never."""
    kto: Any = {"name": "kto"}
    plan = tiny_plan(training=Training(algorithm="group", loss=kto, epochs=2), pairs=Pairs())
    counts = {stage.name: stage.counts for stage in plan.stages}["train"]
    assert counts["tokens trained"] == 2 * (800 + 6400) and counts["tokens looked at"] == 2 * 2 * (800 + 6400)
    coupled = {stage.name: stage.counts for stage in tiny_plan(training={"loss": {"name": "dr_dpo"}}).stages}["train"]
    assert coupled["tokens looked at"] == coupled["tokens trained"] == 800 * 24


def test_a_judges_questions_by_hand() -> None:
    """100 prompts of 8 responses: 8 x 7 ordered pairs each, in five rounds; against the greedy one 2 x 8."""
    judge = {"kind": "judge", "name": "referee", "model": "m", "mode": "pairwise", "endpoint": "http://localhost/v1"}
    blocks: dict[str, Any] = {"pairs": Pairs(), "verifiers": [judge]}
    for name, each in (("pairwise_grpo", 56), ("pairwise_ppo", 16)):
        training = Training(algorithm=name, reward={"judge": "referee"})  # type: ignore[arg-type]
        plan = tiny_plan(training=training, **blocks)
        stages = {stage.name: stage for stage in plan.stages}
        assert list(stages)[2:5] == ["sample", "compare", "verify"]
        assert (stages["compare"].times, stages["compare"].counts) == (5, {"questions": 100 * each})
        asked = f"referee is asked {100 * each:,} questions about two responses a round, {500 * each:,} in all"
        assert asked in plan.notes
        assert f"+ questions {500 * each:,} x 80" in render(plan)


def test_totals_count_every_round() -> None:
    plan = tiny_plan()
    assert plan.total("tokens sampled") == 5 * 6400 + 4 * 120 * 8
    assert plan.total("steps") == 5 * 8 + 10


def test_the_plan_is_json_and_prints_every_part() -> None:
    plan = tiny_plan()
    read_back = json.loads(json.dumps(plan.to_json()))
    assert read_back["totals"]["device_bytes"] == sum(p.bytes for p in plan.memory) == plan.device_bytes()
    text = render(plan)
    for part in (*plan.memory, *plan.disk):
        assert part.formula in text
    assert "200 training prompts are used 2.50 times over; 30 are held out" in text
    assert "\x1b" not in text


def test_checkpoints_on_disk_are_one_more_than_are_kept() -> None:
    plan = tiny_plan(training={"keep_checkpoints": 2, "zero_stage": 1})
    disk = {store.name: store.bytes for store in plan.disk}
    assert disk["checkpoints"] == 3 * plan.policy.parameters * (4 + 12)
    assert disk["new model"] == disk["export"] == plan.policy.parameters * 4


def test_the_prompts_are_read_where_they_are_not_given() -> None:
    plan = make_plan(recipe(prompts={"arithmetic": {"digits": 2, "count": 400}}), machine=machine())
    assert plan.prompts.longest == len("12+34=")
    assert plan.prompts.train is not None and plan.prompts.eval is not None
    assert plan.prompts.train + plan.prompts.eval == 400


# ---- what is refused -----------------------------------------------------------------------------------------------


def refuse_memory() -> None:
    where = Machine("cpu", "CPU", 0, 1, 2 * GIB, 2 * GIB, 2 * GIB, 2 * GIB)
    big = {"from_scratch": {"context": 64, "hidden_size": 2048, "intermediate_size": 8192, "layers": 24}}
    make_plan(recipe(policy=big), prompts=prompt_set(), machine=where)


def refuse_gpu_share() -> None:
    where = machine("cuda", 4 * GIB)
    engine = {"gpu_memory_utilization": 0.92}
    make_plan(recipe(sampling={"engine": engine}, training={"zero_stage": 2}), prompts=prompt_set(), machine=where)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "memory": (refuse_memory, r"memory: the run needs .* part with a knob: optimizer, .* policy\.lora, .*offload"),
    "share": (refuse_gpu_share, r"with a knob: sampler KV cache, .*utilization 0\.92.*sampling\.engine: \{kv_cache_m"),
    "response": (
        lambda: tiny_plan(sampling={"max_new_tokens": 40, "engine": {"max_model_len": 40}}),
        r"sampling\.max_new_tokens: 40 leaves no room .* sampling\.engine\.max_model_len of 40 tokens; lower it to 39",
    ),
    "context": (
        lambda: tiny_plan(prompts={"max_tokens": 60}),
        r"prompts\.max_tokens: 60 and sampling\.max_new_tokens: 8 .* context of 64 tokens; lower one of them by 4",
    ),
    "missing": (
        lambda: tiny_plan(policy={"from_scratch": None, "model": "./nowhere"}, cold_start={"source": "x.jsonl"}),
        r"policy\.model: \./nowhere: no such directory",
    ),
    "engine": (lambda: tiny_plan(sampling={"engine": {"dtype": "float16"}}), r"sampling\.engine\.dtype: cannot be set"),
    "deepspeed": (
        lambda: tiny_plan(training={"deepspeed": {"zero_optimization": {"stage": 1}}}),
        r"training\.deepspeed\.zero_optimization\.stage: the recipe decides this by training\.zero_stage",
    ),
    "prompts": (
        lambda: tiny_plan(rounds={"prompts_per_round": 201}),
        r"rounds\.prompts_per_round: 201 prompts wanted, but there are only 200",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_key_to_turn(case: str) -> None:
    act, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        act()


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_disk", lambda directory: 1_000_000)
    with pytest.raises(InputError, match=r"disk: the run needs .* free under output_dir.*training\.keep_checkpoints"):
        tiny_plan()


def test_another_machine_is_planned_for_without_this_ones_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_disk", lambda directory: 0)
    plan = make_plan(recipe(), ranks=4, prompts=prompt_set(), machine=imagined(4, gpu_gib=80, host_gib=1000))
    assert plan.disk_free is None and "GPUs of 80 GiB" in render(plan)
    assert (plan.machine.device_bytes, plan.machine.host_bytes) == (80 * GIB, 250 * GIB)


def test_everything_that_cannot_fit_is_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_disk", lambda directory: 0)
    with pytest.raises(InputError) as refused:
        refuse_memory()
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "memory",
        "memory of the cold start",
        "disk",
    ]


def test_offloaded_state_is_held_against_main_memory(qwen: ModelShape) -> None:
    """On a GPU the host has its own budget; on a CPU everything is main memory."""
    settings = recipe(policy={"dtype": "bfloat16"}, training={"zero_stage": 2, "offload": "optimizer"})
    plan = make_plan(settings, prompts=prompt_set(), machine=machine("cuda", 80 * GIB, host=GIB))
    assert plan.host_bytes() == 16 * plan.policy.parameters
    tight = machine("cuda", 80 * GIB, host=10_000_000)
    with pytest.raises(InputError, match=r"main memory: the run needs .* that each rank has here"):
        make_plan(settings, prompts=prompt_set(), machine=tight)
