"""What the stages hand to each other: frozen rows, one class per artifact.

Token ids are the truth.  Nothing downstream of sampling re-tokenises text, and every id is a content
hash, so the same work always gets the same name and a resumed run cannot lose or repeat a row.

Legend: P prompts, G samples of one prompt, N samples (P*G), M verifiers, T response tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def content_id(*parts: object) -> str:
    """Sixteen hex digits that depend on every part and on where one part ends and the next begins.

    Example: content_id("ab", "c") != content_id("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Given:
    """A response that the prompt source brings along, as the policy would have written it.

    Example: Given("580", (8, 11, 3, 1))
    """

    text: str
    response_ids: tuple[int, ...]  # [T], ends with the end-of-sequence id


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as the policy sees it.

    Example: Prompt(id="3f…", text="123+456=", token_ids=(4, 5, 6, 14, 7, 8, 9, 15), answer="579", split="train")
    """

    id: str  # content_id of the rendered text
    text: str  # rendered, after the chat template; without special tokens that only the tokenizer adds
    token_ids: tuple[int, ...]
    answer: str | None  # reference answer for verifiers that take one; never shown to the policy
    split: str  # "train" or "eval"
    columns: tuple[tuple[str, str], ...] = ()  # (name, text) of further columns that verifiers read
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) that a chat template made `text` of; empty without one
    dispreferred: Given | None = None  # a bad answer to it; training prompts of a recipe that names the column


@dataclass(frozen=True, slots=True)
class Sample:
    """One response drawn from one version of the policy.

    Example: Sample(id="9c…", prompt_id="3f…", index=0, policy_version=2, seed=81, prompt_ids=(4, …),
    response_ids=(8, 10, 12, 1), logprobs=(-0.1, -0.3, -0.2, -0.01), text="579", finish_reason="stop",
    temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)
    """

    id: str  # content_id(prompt_id, policy_version, seed, index)
    prompt_id: str
    index: int  # 0 … G-1 within the prompt
    policy_version: int  # rounds of training behind the weights that drew it
    seed: int  # the request's own seed
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # [T], with the end-of-sequence id where the policy wrote one
    logprobs: tuple[float, ...]  # [T], the sampler's log-probability of each response id, before temperature
    text: str  # response text without special tokens
    finish_reason: str  # "stop" or "length", from the engine
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verifier said of one sample: a number, or none with the reason.

    Example: Verdict("9c…", "nines", 1.0, None, 2e-6) or Verdict("9c…", "nines", None, "the prompt is not a+b=", 2e-6)
    """

    sample_id: str
    verifier: str
    value: float | None  # binary verifiers: 0.0 or 1.0; score verifiers: any finite number
    reason: str | None  # set exactly when value is None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a pairwise judge said of two responses to one prompt, shown in this order.

    Example: Comparison("3f…", "9c…", "10…", "referee", 0.62, None) or, where no answer could be read,
    Comparison("3f…", "10…", "9c…", "referee", None, "the judge answers none of A, B: together 0.002, below 0.01")
    """

    prompt_id: str
    first_id: str
    second_id: str
    verifier: str
    strength: float | None  # how much better the first is than the second, -1 to 1
    reason: str | None  # set exactly when strength is None


@dataclass(frozen=True, slots=True)
class Score:
    """The verifiers' verdicts on one sample, combined.

    Example: Score("9c…", "3f…", p_good=0.93, reward=0.93, spread=0.21, voters=6)
    """

    sample_id: str
    prompt_id: str
    p_good: float  # calibrated P(response is good), in [0, 1]
    reward: float  # what rank-based builders sort by; larger is better
    spread: float  # standard deviation over the verifiers' normalised scores
    voters: int  # verifiers that did not abstain


@dataclass(frozen=True, slots=True)
class PrefixValue:
    """What the first steps of a response are worth.

    Example: PrefixValue("5d…", "3f…", "9c…", step=2, tokens=12, rollouts=10, value=0.4, best=0.93)
    """

    id: str  # name of the prompt with these tokens behind it
    prompt_id: str
    sample_id: str  # a response that begins with them
    step: int  # steps so far; 0 is the prompt alone
    tokens: int  # response tokens so far
    rollouts: int  # rollouts that were judged; with 0 the value says nothing
    value: float
    best: float  # P(good) of the best continuation


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference between two samples of one prompt, with how sure of it we are.

    Example: Pair("b7…", "3f…", chosen_id="9c…", rejected_id="10…", p_win=0.80, p_tie=0.17, weight=0.83, margin=0.6,
    builder="best_worst")
    """

    id: str  # content_id(chosen_id, rejected_id)
    prompt_id: str
    chosen_id: str
    rejected_id: str
    p_win: float  # P(chosen is good and rejected is not)
    p_tie: float  # P(both good or both bad)
    weight: float  # factor on this pair's loss
    margin: float  # reward(chosen) - reward(rejected)
    builder: str

    @property
    def label(self) -> float:
        """P(chosen better | not a tie), the soft label of the loss; 0.5 where a tie is certain."""
        decided = 1.0 - self.p_tie
        return min(1.0, self.p_win / decided) if decided > 0 else 0.5  # rounding can exceed 1
