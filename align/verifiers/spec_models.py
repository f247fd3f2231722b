"""Recipe blocks of the verifiers that ask a language model or a classifier."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from align.verifiers.spec_base import VerifierBlock

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class AskedModel(VerifierBlock):
    """Settings of a verifier that puts questions to a language model, in this process or behind an endpoint."""

    output = "score"
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 60.0
    """Longest time one request to an endpoint may take, answer and all."""
    model: str
    """Directory of the checkpoint (safetensors), its name on the hub, or the name that the endpoint knows it by."""
    revision: str | None = None
    """Commit of a hub model."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible server (`http://127.0.0.1:8000/v1`): https, or loopback."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the endpoint's key; the key itself is nowhere kept."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests to an endpoint at a time."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Times that a request is sent again after a busy or failing endpoint, not after an answer."""
    max_tokens: int | None = None
    """Longest input of a model in this process; a longer one gets none, it is never cut."""
    max_characters: Annotated[int, Field(ge=1)] = 200_000
    """Longest question that is put to an endpoint; a longer one gets none."""
    engine: dict[str, Any] = {}
    """Further keyword arguments for `vllm.LLM`, for a model in this process."""

    @model_validator(mode="after")
    def _one_place(self) -> AskedModel:
        if self.endpoint is None:
            idle = [key for key in ("key_variable", "concurrency", "retries", "max_characters") if self._given(key)]
            if idle:
                raise ValueError(f"{idle[0]}: is for an endpoint, and none is named")
            return self
        idle = [key for key in ("revision", "max_tokens", "engine") if self._given(key)]
        if idle:
            raise ValueError(f"{idle[0]}: is for a model in this process; an endpoint decides it itself")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("endpoint: is not an address such as https://host/v1")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError("endpoint: over plain http only this machine (127.0.0.1) may be asked; use https")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("endpoint: may hold no user, key or query; name the key's variable in `key_variable`")
        return self

    def _given(self, key: str) -> bool:
        """Whether it says something else than its default, as in the other blocks: a recipe written out whole holds."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)


class JudgeSpec(AskedModel):
    """A language model's opinion: P(yes), a mark from 1 to 5, or a comparison with the prompt's other responses."""

    kind: Literal["judge"]
    mode: Literal["yes_no", "rubric", "pairwise"] = "yes_no"
    """P(Yes) from the probabilities of the words; a written mark, strictly parsed; or the mean difference against the
    prompt's other responses, every two asked in both orders."""
    question: str | None = None
    """What the judge is to look at, in your words; by default whether the response is correct and helpful."""
    context_column: str | None = None
    """Column of the prompt source with text for the judge only: a debate's transcript, a document."""
    show_answer: bool = False
    """Show the judge the prompt's reference answer."""
    least_mass: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """None where the words asked for have less probability than this together: the judge did not answer."""
    answer_tokens: Annotated[int, Field(ge=1, le=8192)] = 512
    """Longest answer of a `rubric` judge."""
    opponents: Annotated[int, Field(ge=1)] | None = None
    """Other responses that each is compared with in `pairwise`; by default all."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The context column."""
        return () if self.context_column is None else (self.context_column,)

    @model_validator(mode="after")
    def _mode_reads_it(self) -> JudgeSpec:
        reads = {"yes_no": {"least_mass"}, "rubric": {"answer_tokens"}, "pairwise": {"least_mass", "opponents"}}
        for key in ("least_mass", "answer_tokens", "opponents"):
            if self._given(key) and key not in reads[self.mode]:
                raise ValueError(f"{key}: a judge in mode {self.mode} does not read it")
        return self


class MetaRankingSpec(AskedModel):
    """Comparisons with reference responses to other prompts, of which it is known whether they are right."""

    kind: Literal["meta_ranking"]
    file: str
    """JSONL with `prompt`, `response` and `good` (true or false), one reference a line."""
    references: Annotated[int, Field(ge=1)] = 5
    """References that each response is compared with; drawn from the file by the hash of its lines."""
    strong: Annotated[float, Field(ge=0.0)] = 1.0
    """What better than a right reference counts, and worse than a wrong one against."""
    weak: Annotated[float, Field(ge=0.0)] = 0.5
    """What better than a wrong reference counts, and worse than a right one against."""
    least_mass: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """None where the words asked for have less probability than this together."""


class LikelihoodBlock(VerifierBlock):
    """Settings of a verifier that reads log-probabilities of a text from a language model in this process."""

    output = "score"
    model: str | None = None
    """Directory of the checkpoint (safetensors), or its name on the hub; by default the policy before training."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int | None = None
    """Longest input; a longer one gets none, it is never cut."""
    engine: dict[str, Any] = {}
    """Further keyword arguments for `vllm.LLM`."""

    @model_validator(mode="after")
    def _revision_of_something(self) -> LikelihoodBlock:
        if self.model is None and self.revision is not None:
            raise ValueError("revision: goes with `model`, and only with it")
        return self


class BackwardLikelihoodSpec(LikelihoodBlock):
    """Mean log P(token of the prompt | response): does the response let one guess the question (score)."""

    kind: Literal["backward_likelihood"]
    template: str = "{response}\n\nThe text above answers this question:\n"
    """What stands before the prompt; `{response}` is replaced."""

    @model_validator(mode="after")
    def _names_the_response(self) -> BackwardLikelihoodSpec:
        if self.template.count("{response}") != 1:
            raise ValueError("template: must hold {response} exactly once")
        return self


class SequenceLikelihoodSpec(LikelihoodBlock):
    """Mean log P(token of the response | prompt) under a model (score)."""

    kind: Literal["sequence_likelihood"]


class ClassifierSpec(VerifierBlock):
    """A sequence classifier: the probability of one of its labels, such as a guard's `safe` (score)."""

    output = "score"
    kind: Literal["classifier"]
    model: str
    """Directory of the checkpoint (safetensors), or its name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    label: str
    """The label whose probability is the score, as `id2label` in config.json names it."""
    text: Literal["response", "joined", "pair", "chat"] = "response"
    """What is classified: the response alone, prompt and response joined, both as a pair of texts, or as a chat."""
    through: Literal["vllm", "transformers"] = "vllm"
    """What runs the model; transformers knows more architectures, vLLM is faster."""
    max_tokens: int | None = None
    """Longest input; a longer one gets none, it is never cut."""
    engine: dict[str, Any] = {}
    """Further keyword arguments for `vllm.LLM`."""

    @model_validator(mode="after")
    def _vllm_reads_it(self) -> ClassifierSpec:
        if self.engine and self.through != "vllm":
            raise ValueError("engine: is read with `through: vllm` only")
        return self
