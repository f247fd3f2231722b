"""The recipe: everything that a run depends on, typed, frozen, and refused where it says something unknown.

Each class is one block of the YAML file; the sentence under a field is its documentation and goes into
`align schema`.  Cross-field rules stand in the validators, and each message names the key and the way out.
Reading a file, with positions for every error, is `align.recipe_file`.  This module imports pydantic only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.recipe_base import Block, Count, Fraction, NonNegative, Positive
from align.recipe_group import group_faults
from align.recipe_labels import Labels, label_faults
from align.recipe_negative import negative_faults
from align.recipe_preference import preference_faults
from align.recipe_rl import ONE_IS_ENOUGH, policy_gradient_faults
from align.recipe_steps import Steps, step_faults
from align.recipe_supervised import supervised_faults
from align.recipe_training import Training, training_faults
from align.verifiers.spec import VerifierSpec


class Lora(Block):
    """Train low-rank adapters instead of the weights; the reference is the model with the adapter off."""

    r: Count = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale of the adapters; the update is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: `all-linear`, or a list of module names."""


class Scratch(Block):
    """A small Qwen3-shaped model with random weights and a one-token-per-character tokenizer."""

    hidden_size: Count = 128
    """Width of the residual stream."""
    intermediate_size: Count = 384
    """Width of the feed-forward layer."""
    layers: Count = 4
    """Number of layers."""
    heads: Count = 4
    """Number of attention heads."""
    kv_heads: Count = 2
    """Number of key and value heads."""
    head_dim: Count = 32
    """Width of one head; vLLM on CPU needs a multiple of 32."""
    context: Count = 128
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = True
    """Use the input embedding as the output head."""
    characters: str = "0123456789+-*=;:, ()cqr?"
    """The alphabet, one token each, beside the special tokens."""


class Policy(Block):
    """The model that is aligned."""

    model: str | None = None
    """Directory of a Hugging Face checkpoint (safetensors), or the name of one on the hub."""
    revision: str | None = None
    """Commit of a hub model; a run with a hub model should pin it."""
    from_scratch: Scratch | None = None
    """Make a new model of this shape instead of loading one; needs `cold_start`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the weights in training and in the sampler."""
    lora: Lora | None = None
    """Train adapters only."""

    @model_validator(mode="after")
    def _one_source(self) -> Policy:
        if (self.model is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of `model` and `from_scratch`; an override takes one away with `=null`")
        return self


class ColdStart(Block):
    """Supervised fine-tuning before the first round, through TRL's SFTTrainer."""

    source: str = "prompts"
    """`prompts`: write solutions for the built-in task; otherwise a JSONL, CSV or Parquet file of them."""
    prompt_column: str = "prompt"
    """Column that holds the prompt, for a file."""
    response_column: str = "response"
    """Column that holds the response, for a file."""
    examples: Count = 20000
    """How many solutions to write (built-in task), or the most rows to read."""
    error_rate: Fraction = 0.0
    """Share of the written solutions that are wrong (built-in task)."""
    steps: Count = 300
    """Optimizer steps."""
    batch_size: Count = 128
    """Examples per optimizer step, over all ranks."""
    learning_rate: Positive = 2e-3
    """Peak learning rate, after a short warm-up, with cosine decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""


class Arithmetic(Block):
    """The built-in task: integer problems whose answer anybody can check, but only the gold verifier does."""

    digits: Annotated[int, Field(ge=1, le=9)] = 3
    """Digits of each operand; the first digit is never zero."""
    operation: Literal["+", "-", "*"] = "+"
    """What is asked."""
    count: Count = 20000
    """How many different problems to draw."""
    solution: Literal["answer", "columns"] = "answer"
    """What cold-start solutions look like: the bare answer, or column by column with carries and then the answer."""


class Prompts(Block):
    """Where the questions come from."""

    source: str = "arithmetic"
    """`arithmetic`, a JSONL, CSV or Parquet file, or `hub:<dataset>[/<config>][:<split>]`."""
    arithmetic: Arithmetic = Arithmetic()
    """Settings of the built-in task."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: text, or a list of chat messages."""
    answer_column: str | None = None
    """Column that holds the reference answer."""
    split_column: str | None = None
    """Column that says `train` or `eval` (also `test`, `validation`); without it `eval_fraction` splits by hash."""
    revision: str | None = None
    """Commit of a hub dataset."""
    limit: Count | None = None
    """Read at most this many rows."""
    chat_template: bool = False
    """Render each prompt with the tokenizer's chat template; otherwise it is used as it is."""
    system_prompt: str | None = None
    """System message, with a chat template."""
    eval_fraction: Fraction = 0.1
    """Share of the prompts kept out of training, by hash of the prompt, so it never changes with file order."""
    dedupe: bool = True
    """Drop repeated prompts; off, a repeated prompt is an error."""
    max_tokens: Count | None = None
    """Longest prompt; longer ones are dropped and counted. Default: what the context leaves beside the response."""
    max_dropped_fraction: Fraction = 0.0
    """Refuse the source where more than this share is too long."""


class Sampling(Block):
    """How responses are drawn from the policy with vLLM."""

    samples_per_prompt: Count = 8
    """Responses per prompt and round; one is enough for ppo, reinforce_pp and remax only."""
    temperature: Positive = 1.0
    """Softmax temperature."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this mass."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep this many tokens; 0 keeps all."""
    max_new_tokens: Count = 512
    """Longest response, in tokens."""
    max_cut_fraction: Fraction = 1.0
    """Stop the run where more than this share of a round's responses hits `max_new_tokens`."""
    prompts_per_shard: Count = 256
    """Prompts sampled and committed together: the unit that a resumed run repeats at most."""
    attest_tolerance: Positive | None = None
    """Largest mean |log-prob difference| between trainer and sampler after a weight sync. Default: by dtype."""
    engine: dict[str, Any] = {}
    """Further keyword arguments for `vllm.LLM`."""


class Ensemble(Block):
    """How the verdicts on one response become P(good) and a reward."""

    method: Literal[
        "auto", "mean", "majority", "moments", "matched_moments", "triplets", "dawid_skene", "one_coin", "gaussian",
        "gaussian_full", "naive_bayes", "logistic", "best_single", "weaver",
    ] = "auto"  # fmt: skip
    """`auto` lets labels, or without them the verifiers' own agreement, choose; the others are one label model each."""
    class_balance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of good responses where it is known; otherwise estimated."""
    prior_strength: NonNegative = 2.0
    """Pseudo-votes of the Beta priors that tilt each verifier to better than chance."""
    covariance_shrinkage: Fraction = 0.1
    """How far `gaussian_full` shrinks the covariance within a class to its diagonal."""
    ridge: NonNegative = 5.0
    """L2 penalty of `logistic`."""
    clusters: Count = 1
    """Groups of prompts by their number of distinct answers; `weaver` fits each alone."""
    max_iterations: Count = 200
    """Rounds of EM at most."""
    min_voters: Count = 1
    """A response with fewer verdicts gets no score and leaves the round."""
    labels: Labels = Labels()


class Pairs(Block):
    """How scored responses become preference pairs."""

    builder: Literal["best_worst", "all_margin", "top_bottom", "per_step", "partial", "tree"] = "best_worst"
    """One pair per prompt, every pair over the margin, the top k against the bottom k; or inside the responses: the
    step that goes wrong, partly-correct solutions, a search over steps."""
    min_margin: NonNegative = 0.0
    """Drop pairs whose rewards differ by no more than this."""
    k: Count = 2
    """How many from each end, for `top_bottom`."""
    max_per_prompt: Count | None = None
    """Keep at most this many pairs of a prompt, widest margin first."""
    max_tie: Fraction = 1.0
    """Drop pairs that are a tie with more than this probability."""
    labels: Literal["soft", "hard"] = "soft"
    """`soft` gives the loss P(win) and a weight; `hard` says the chosen one wins, weight 1."""
    steps: Steps = Steps()
    """Settings of the builders that look inside the responses."""


class Rounds(Block):
    """How often the loop turns."""

    count: Count = 3
    """Rounds of sample, verify, pair where the trainer learns from pairs, and train."""
    prompts_per_round: Count = 512
    """Prompts drawn per round; the training prompts are used in a seeded order and come round again."""
    on_empty: Literal["stop", "continue"] = "stop"
    """What to do with a round that yields not one usable pair, or not one usable response."""


class Evaluation(Block):
    """Measured before the first round, every `every` rounds, and after the last."""

    prompts: Count = 256
    """Held-out prompts used; fewer where the split has fewer."""
    samples_per_prompt: Count = 4
    """Responses per held-out prompt."""
    temperature: Positive = 1.0
    """Softmax temperature of the evaluation samples; `kl` is reported at 1 only, with nothing cut off."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of the evaluation samples."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Tokens kept in the evaluation samples; 0 keeps all."""
    k: tuple[Count, ...] = (1, 4)
    """pass@k is reported for these k."""
    every: Count = 1
    """Rounds between evaluations."""
    gold: VerifierSpec | None = None
    """A verifier that training never sees; reported beside the proxy in every round."""
    bootstrap: Count = 1000
    """Resamples of the prompts behind each interval."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """Mass of each interval."""

    @model_validator(mode="after")
    def _k_fits(self) -> Evaluation:
        if self.k and max(self.k) > self.samples_per_prompt:
            raise ValueError(f"k: pass@{max(self.k)} needs samples_per_prompt of at least {max(self.k)}")
        return self


class Export(Block):
    """The Hugging Face checkpoint at the end."""

    lora: Literal["merge", "keep"] = "merge"
    """Fold adapters into the weights, or write the adapter beside a note of its base model."""
    max_shard_size: str = "5GB"
    """Largest weights file."""
    tolerance: Positive | None = None
    """Largest mean |log-prob difference| between the trained policy and the reloaded export. Default: by dtype."""


class Recipe(Block):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """Name of the run and of its directory under `output_dir`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything that is drawn."""
    output_dir: str = "runs"
    """Directory that holds the run's directory."""
    rank_timeout_s: Positive = 7200.0
    """Longest that a rank waits for another, seconds; must exceed the longest shard of samples."""
    policy: Policy
    cold_start: ColdStart | None = None
    prompts: Prompts = Prompts()
    sampling: Sampling = Sampling()
    verifiers: Annotated[tuple[VerifierSpec, ...], Field(min_length=1)]
    """What scores a response; each entry has a `kind` and a `name`."""
    verdict_cache: bool = True
    """Remember the numbers of slow verifiers by content, in `output_dir`, for later rounds and other runs."""
    ensemble: Ensemble = Ensemble()
    pairs: Pairs = Pairs()
    training: Training = Training()
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()

    def _blocks(self) -> list[tuple[str, VerifierSpec]]:
        """(key, verifier) of every verifier, the gold one too."""
        gold = [("evaluation.gold", self.evaluation.gold)] if self.evaluation.gold is not None else []
        return [*((f"verifiers.{place}", verifier) for place, verifier in enumerate(self.verifiers)), *gold]

    def verifier_columns(self) -> tuple[str, ...]:
        """Columns of the prompt source that verifiers read, beside the prompt and its answer."""
        return tuple(sorted({column for _, verifier in self._blocks() for column in verifier.columns}))

    @model_validator(mode="after")
    def _hangs_together(self) -> Recipe:
        """One line per contradiction, each beginning with the key to look at, so that all are shown at once."""
        wrong: list[str] = []
        names = [v.name for v in self.verifiers]
        for place, name in enumerate(names):
            if name in names[:place]:
                wrong.append(f"verifiers.{place}.name: {name!r} is used twice; give each verifier its own name")
        gold = self.evaluation.gold
        if gold is not None and gold.name in names:
            wrong.append(f"evaluation.gold: {gold.name!r} is also a verifier; the gold verifier must not train")
        if self.prompts.source != "arithmetic" and self.prompts.answer_column is None:
            wrong += [
                f"{key}: {verifier.name!r} needs reference answers; name their column in prompts.answer_column"
                for key, verifier in self._blocks()
                if verifier.kind == "answer" or getattr(verifier, "show_answer", False)
            ]
        if self.prompts.source == "arithmetic":
            wrong += [
                f"{key}: reads the column {verifier.columns[0]!r}, and the built-in task has no columns; name a file"
                for key, verifier in self._blocks()
                if verifier.columns
            ]
        if self.policy.from_scratch is not None and self.cold_start is None:
            wrong.append("policy.from_scratch: a random model cannot sample; add a `cold_start` block")
        if self.policy.lora is not None and self.training.freeze != "none":
            wrong.append("training.freeze: adapters leave all weights as they are already; take one of the two out")
        if self.cold_start is not None and self.cold_start.source == "prompts" and self.prompts.source != "arithmetic":
            wrong.append("cold_start.source: `prompts` writes solutions for the arithmetic task only; name a file")
        if self.export.lora == "keep" and self.policy.lora is not None and self.cold_start is not None:
            wrong.append(
                "export.lora: the adapter's base would be this run's cold start, which nobody else has; use `merge`"
            )
        if self.sampling.max_new_tokens >= (self.policy.from_scratch or Scratch(context=10**9)).context:
            wrong.append("sampling.max_new_tokens: leaves no room for a prompt in policy.from_scratch.context")
        if self.pairs.builder != "top_bottom" and "k" in self.pairs.changed():
            wrong.append(f"pairs.k: {self.pairs.builder} does not read it, only top_bottom does; take it out")
        if self.sampling.samples_per_prompt < 2 and self.training.algorithm not in ONE_IS_ENOUGH:
            wrong.append(
                f"sampling.samples_per_prompt: {self.training.algorithm} compares the responses to a prompt; give at "
                f"least 2 ({', '.join(ONE_IS_ENOUGH)} learn from one)"
            )
        wrong += training_faults(self.training)
        of_family = {
            "policy_gradient": policy_gradient_faults,
            "supervised": supervised_faults,
            "group": group_faults,
            "negative": negative_faults,
        }.get(self.training.trainer.family)
        wrong += of_family(self) if of_family else []
        wrong += preference_faults(self) + label_faults(self)
        if self.training.trainer.consumes != "pairs" and self.pairs.changed():
            wrong.append(f"pairs: {self.training.algorithm} learns from scores and builds no pairs; take the block out")
        outputs = {v.name: v.output for v in self.verifiers}
        wrong += step_faults(self.pairs.builder, self.pairs.steps, outputs)
        if wrong:
            raise ValueError("\n".join(wrong))
        return self
