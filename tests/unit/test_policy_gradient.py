"""Advantages, KL, losses and rewards of the policy-gradient trainers, by hand and by property."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.recipe_rl import PolicyGradient, Reward
from align.records import Comparison, Sample, Score, Verdict
from align.training import advantages as adv
from align.training import kl
from align.training.losses import policy_gradient as losses
from align.training.policy_gradient import _minibatches
from align.training.preference_matrix import Answers, preference_matrix
from align.training.rewards import against, qwen_math, rewarded
from align.training.rl_metrics import round_metrics
from align.training.rollouts import Rollouts, estimate

LENGTHS = np.array([3, 1, 2])


def test_gae_by_hand() -> None:
    """One response of two tokens, reward 1 at the end, values .5 and .25, γ .9, λ .8."""
    found, returns = adv.gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), np.array([2]), 0.9, 0.8)
    last = 1.0 - 0.25
    first = 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * last
    assert found.tolist() == pytest.approx([first, last], abs=1e-15)
    assert returns.tolist() == pytest.approx([first + 0.5, 1.0], abs=1e-15)


def test_gae_at_the_ends_of_lambda() -> None:
    """λ 0 is the one-step error, λ 1 the rewards to go less the value; nothing flows in from another response."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    following = np.array([values[1], values[2], 0.0, 0.0, values[5], 0.0])
    assert adv.gae(rewards, values, LENGTHS, 0.97, 0.0)[0] == pytest.approx(
        rewards + 0.97 * following - values, abs=1e-12
    )
    to_go = np.array([rewards[0] + 0.97 * rewards[1] + 0.97**2 * rewards[2], rewards[1] + 0.97 * rewards[2],
                      rewards[2], rewards[3], rewards[4] + 0.97 * rewards[5], rewards[5]])  # fmt: skip
    assert adv.gae(rewards, values, LENGTHS, 0.97, 1.0)[0] == pytest.approx(to_go - values, abs=1e-12)
    assert adv.rewards_to_go(rewards, LENGTHS, 0.97) == pytest.approx(to_go, abs=1e-12)


def test_the_score_falls_on_the_last_token_of_each_response() -> None:
    rewards = adv.token_rewards(np.array([1.0, 2.0, 3.0]), np.full(6, 0.5), LENGTHS, 0.2)
    assert rewards.tolist() == pytest.approx([-0.1, -0.1, 0.9, 1.9, -0.1, 2.9])


def test_whitening_counts_only_what_is_counted() -> None:
    values, counted = np.array([1.0, 2.0, 3.0, 100.0]), np.array([True, True, True, False])
    found = adv.whiten(values, counted)
    assert found[:3].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    assert found[:3].var(ddof=1) == pytest.approx(1.0, abs=1e-6)
    assert adv.whiten(values[:3], shift=False).mean() == pytest.approx(2.0)


def test_kl_estimates_on_fifty_actions() -> None:
    """k1 and k3 agree with the exact KL, k2 does not, and k3 varies less than k1."""
    rng = np.random.default_rng(3)
    policy, reference = (torch.log_softmax(torch.from_numpy(rng.normal(scale=1.1, size=50)), 0) for _ in range(2))
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.from_numpy(rng.choice(50, size=200_000, p=policy.exp().numpy() / policy.exp().sum().item()))
    found = {name: f(policy[drawn], reference[drawn]) for name, f in kl.ESTIMATORS.items()}
    assert float(found["k1"].mean()) == pytest.approx(exact, abs=0.02)
    assert float(found["k3"].mean()) == pytest.approx(exact, abs=0.02)
    assert abs(float(found["k2"].mean()) - exact) > 0.1
    assert found["k3"].min() >= 0


def test_the_kl_loss_has_the_gradient_of_the_kl() -> None:
    """Averaged exactly over all actions: the penalty's gradient is that of KL(π ‖ π_ref), plain k3's is not."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64), 0)

    def gradient(f: Any) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, 0)
        return torch.autograd.grad((logprobs.exp().detach() * f(logprobs)).sum(), logits)[0]

    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    assert torch.allclose(gradient(lambda lp: kl.penalty(lp, reference, lp.detach(), "k3")), exact, atol=1e-12)
    assert not torch.allclose(gradient(lambda lp: kl.k3(lp, reference)), exact, atol=1e-2)
    assert torch.allclose(gradient(lambda lp: kl.k1(lp, reference)), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_the_kl_loss_corrects_for_an_older_policy() -> None:
    """Drawn by π_old and weighted, the gradient is still that of the KL of π."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(torch.tensor([0.1, -0.2, 0.9], dtype=torch.float64), 0)
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64), 0)
    now = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((now.exp() * (now - reference)).sum(), logits)
    now = torch.log_softmax(logits, 0)
    (found,) = torch.autograd.grad((old.exp() * kl.penalty(now, reference, old, "k3")).sum(), logits)
    assert torch.allclose(found, exact, atol=1e-12)


def test_adaptive_coefficient_moves_by_a_fifth_at_most() -> None:
    assert kl.adapted(0.1, 100.0, 5.0, 1000.0, 500) == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    assert kl.adapted(0.1, 0.0, 5.0, 1000.0, 500) == pytest.approx(0.1 * (1 - 0.2 * 0.5))
    assert kl.adapted(0.1, 5.0, 5.0, 1000.0, 500) == 0.1


def test_pairwise_advantages_of_reward_differences_are_those_of_grpo() -> None:
    rewards = np.random.default_rng(1).normal(size=7)
    found = adv.from_preferences(np.subtract.outer(rewards, rewards))
    assert found == pytest.approx(adv.group_relative(rewards, ["p"] * 7), abs=1e-5)  # the two put ε elsewhere


def test_a_cycle_of_preferences_pushes_nothing_and_order_bias_cancels() -> None:
    cycle = np.array([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    assert adv.from_preferences(cycle) == pytest.approx(np.zeros(3), abs=1e-12)
    assert adv.from_preferences(cycle + 0.4) == pytest.approx(np.zeros(3), abs=1e-12)  # likes what is first


def test_ratings_of_a_matrix_by_hand() -> None:
    """d = ((0, .6, .2), (-.6, 0, -.1), (-.2, .1, 0)): row means over the root of half the mean square of six."""
    d = np.array([[0.0, 0.6, 0.2], [-0.6, 0.0, -0.1], [-0.2, 0.1, 0.0]])
    strength = d + 0.3 * (1 - np.eye(3))  # the judge likes what is first
    assert adv.ratings(strength) == pytest.approx(np.array([0.8, -0.7, -0.1]) / 3, abs=1e-12)
    scale = math.sqrt((0.36 + 0.04 + 0.01) / 3 / 2 + 1e-6)
    assert adv.from_preferences(strength) == pytest.approx(np.array([0.8, -0.7, -0.1]) / 3 / scale, abs=1e-12)


def test_a_pair_that_was_not_answered_is_no_tie() -> None:
    """.5, .1 and -.6 with the outer two never compared: the chain .4 and .7 says as much.  And one without any."""
    rewards = np.array([0.5, 0.1, -0.6])
    strength = np.subtract.outer(rewards, rewards)
    strength[0, 2] = np.nan  # one order is enough to spoil the pair
    assert adv.ratings(strength) == pytest.approx(rewards, abs=1e-12)
    scale = math.sqrt((0.16 + 0.49) / 2 / 2 + 1e-6)
    assert adv.from_preferences(strength) == pytest.approx(rewards / scale, abs=1e-12)
    strength[1, 2] = np.nan
    found = adv.ratings(strength)
    assert found[:2] == pytest.approx([0.2, -0.2], abs=1e-12) and np.isnan(found[2])


def test_leave_one_out_by_hand_and_its_refusal_of_one() -> None:
    found = adv.leave_one_out(np.array([1.0, 0.0, 0.5, 2.0]), ["a", "a", "a", "a"])
    assert found.tolist() == pytest.approx([1 - 2.5 / 3, -3.5 / 3, 0.5 - 1.0, 2 - 0.5])
    with pytest.raises(ValueError, match="needs two responses"):
        adv.leave_one_out(np.array([1.0]), ["a"])


def test_token_weights_add_up_over_any_split() -> None:
    """Each mode's weights over two batches are what they are over one."""
    lengths = torch.tensor([3, 1, 2])
    sizes: dict[str, Any] = {"tokens": 6, "responses": 3, "fixed_length": 8}
    for mode in losses.AGGREGATIONS:
        whole = losses.token_weights(lengths, mode, **sizes)
        parts = [losses.token_weights(lengths[i : i + 1], mode, **sizes) for i in range(3)]
        assert torch.equal(whole, torch.cat(parts))
    assert losses.token_weights(lengths, "token_mean", **sizes)[0] == pytest.approx(1 / 6)
    assert losses.token_weights(lengths, "sequence_mean", **sizes)[4] == pytest.approx(1 / 6)
    assert losses.token_weights(lengths, "sequence_sum_fixed", **sizes)[4] == pytest.approx(1 / 24)


def test_masked_responses_are_in_no_step() -> None:
    """And a prompt with nothing else makes none: a zero gradient would still move the weights by momentum."""
    rollouts = Rollouts(
        ids=list("abcd"),
        groups=["p", "p", "q", "q"],
        lengths=np.array([1, 1, 1, 1]),
        scores=np.zeros(4),
        old=np.zeros(4),
        masked=np.array([False, True, True, True]),
    )
    assert _minibatches(rollouts, 1, "seed") == [[0]]
    assert _minibatches(rollouts, 1, "seed", least=2) == []  # p3o takes two responses at a time


def test_clipped_tokens_give_no_gradient() -> None:
    """Beyond the bound in the direction of its advantage a token has no gradient; in the other it keeps its own."""
    old = torch.zeros(4)
    now = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    batch = losses.TokenBatch(now, old, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    losses.clipped(batch, 0.2, 0.2).sum().backward()
    assert now.grad is not None
    assert now.grad.tolist() == pytest.approx([0.0, math.exp(0.5), -math.exp(-0.5), 0.0])
    assert losses.clip_share(batch, 0.2, 0.2).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_p3o_is_half_the_gap_and_blind_to_a_shift() -> None:
    now = [torch.tensor([x], requires_grad=True) for x in (-3.0, -5.0)]
    old = (torch.tensor([-3.0]), torch.tensor([-5.0]))

    def gradient(shift: float) -> list[float]:
        loss = losses.joint((now[0], now[1]), old, (torch.tensor([2.0 + shift]), torch.tensor([0.5 + shift])))
        return [float(g) for g in torch.autograd.grad(loss.sum(), now)]

    assert gradient(0.0) == pytest.approx([-0.75, 0.75]) == gradient(100.0)


def test_p3o_on_all_pairs_is_half_of_leave_one_out() -> None:
    """At the old policy its gradient summed over pairs is that of RLOO, up to (G - 1) / 2."""
    rewards = torch.tensor([0.3, 1.0, -0.4, 0.6])
    now = torch.zeros(4, requires_grad=True)
    old = torch.zeros(4)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    losses.joint((now[a], now[b]), (old[a], old[b]), (rewards[a], rewards[b])).sum().backward()
    expected = adv.leave_one_out(rewards.numpy(), ["p"] * 4) * 3 / 2
    assert now.grad is not None and (-now.grad).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_value_clip_keeps_the_larger_error() -> None:
    """A prediction that ran past the clip is judged by the worse of the two."""
    found = losses.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    assert found.item() == pytest.approx(0.5 * 0.8**2)
    assert losses.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), None).item() == 0.0


def test_importance_weights_are_cut_at_the_cap_only() -> None:
    found = losses.importance_weights(torch.tensor([0.0, -1.0, 5.0]), torch.tensor([0.0, 0.0, 0.0]), 2.0)
    assert found.tolist() == pytest.approx([1.0, math.exp(-1), 2.0])


# ---- rewards ---------------------------------------------------------------------------------------------------------


def sample(prompt: str, index: int, finish: str = "stop", temperature: float = 1.0) -> Sample:
    return Sample(
        id=f"{prompt}{index}", prompt_id=prompt, index=index, policy_version=0, seed=0, prompt_ids=(3,),
        response_ids=(4, 5), logprobs=(-1.0, -1.0), text="", finish_reason=finish, temperature=temperature, top_p=1.0,
        top_k=0, max_new_tokens=2,
    )  # fmt: skip


def score(sample_id: str, p_good: float) -> Score:
    return Score(sample_id, sample_id[0], p_good, p_good, 0.0, 3)


SAMPLES = {s.id: s for s in [sample("a", 0), sample("a", 1, "length"), sample("a", 2), sample("b", 0), sample("b", 1)]}
SCORES = [score("a0", 0.9), score("a1", 0.2), score("b0", 0.5), score("b1", 0.5)]


def test_unscored_responses_drop_out_and_equal_groups_are_counted() -> None:
    found = rewarded("grpo", Reward(), SAMPLES, SCORES, [], {})
    assert [s.id for s in found.samples] == ["a0", "a1"]
    assert found.scores.tolist() == [0.9, 0.2]
    assert found.counts == {"unscored": 1, "single": 0, "equal_reward": 2, "masked": 0}
    assert len(rewarded("ppo", Reward(), SAMPLES, SCORES, [], {}).samples) == 4


@pytest.mark.parametrize(
    ("rule", "expected", "masked"),
    [("keep", 0.2, False), ("penalty", -1.0, False), ("zero", 0.0, False), ("mask", 0.2, True)],
)
def test_a_cut_response_is_treated_as_the_recipe_says(rule: str, expected: float, masked: bool) -> None:
    found = rewarded("ppo", Reward(truncated=rule), SAMPLES, SCORES, [], {})  # type: ignore[arg-type]
    place = [s.id for s in found.samples].index("a1")
    assert found.scores[place] == expected and bool(found.masked[place]) is masked
    assert found.counts["masked"] == int(masked)


def test_qwen_math_never_crosses_between_right_and_wrong() -> None:
    """σ(α r_m) + r_v - 1: r_m 2 and α .5 give σ(1) = .731."""
    assert qwen_math(2.0, 1.0, 0.5) == pytest.approx(0.7310585786)
    for value in (-30.0, -1.0, 0.0, 4.0, 30.0):
        assert -1.0 <= qwen_math(value, 0.0, 0.5) <= 0.0 <= qwen_math(value, 1.0, 0.5) <= 1.0
    verdicts = [
        Verdict("a0", "rm", 2.0, None),
        Verdict("a1", "rm", None, "too long"),
        Verdict("b0", "other", 1.0, None),
    ]
    found = rewarded("ppo", Reward(shaping="qwen_math", verifier="rm"), SAMPLES, SCORES, verdicts, {})
    assert [s.id for s in found.samples] == ["a0"]  # what the reward model did not score is not 0, it is gone
    assert found.scores[0] == pytest.approx(0.7310585786 + 0.9 - 1.0) and found.counts["unscored"] == 4


def test_initial_normalisation_is_fixed_by_the_first_round() -> None:
    verdicts = [Verdict(i, "rm", v, None) for i, v in [("a0", 10.0), ("a1", 14.0), ("b0", 12.0), ("b1", 12.0)]]
    settings, state = Reward(source="verifier", verifier="rm", normalise="initial", clip=1.0), {}  # type: dict[str, Any]
    first = rewarded("ppo", settings, SAMPLES, SCORES, verdicts, state)
    assert state["reward_mean"] == pytest.approx(12.0)
    assert first.scores.tolist() == [-1.0, 1.0, 0.0, 0.0]  # ±1.22, cut at 1
    later = [Verdict(v.sample_id, "rm", v.value + 1.0, None) for v in verdicts if v.value is not None]
    assert rewarded("ppo", settings, SAMPLES, SCORES, later, state).scores[2] == pytest.approx(1 / state["reward_std"])


def test_scaling_by_the_spread_leaves_the_mean_in() -> None:
    """To subtract it would reward every token, and so length."""
    settings = Reward(normalise="std")
    found = rewarded("ppo", settings, SAMPLES, SCORES, [], {})
    values = np.array([0.9, 0.2, 0.5, 0.5])
    assert found.scores == pytest.approx(values / values.std(ddof=1), abs=1e-6)


def test_the_greedy_response_is_a_baseline_and_never_trained_on() -> None:
    samples = SAMPLES | {"a3": sample("a", 3, temperature=0.0)}
    scores = [*SCORES, score("a3", 0.7)]
    found = rewarded("remax", Reward(), samples, scores, [], {})
    assert [s.id for s in found.samples] == ["a0", "a1"] and found.counts["no_greedy"] == 2
    assert found.baselines is not None and found.baselines.tolist() == [0.7, 0.7]
    against_it = rewarded("pairwise_ppo", Reward(), samples, scores, [], {})
    assert against_it.scores[0] == pytest.approx(math.log(9) - math.log(7 / 3))


def test_the_chance_to_beat_an_anchor_by_hand() -> None:
    """p .9 against .7: .9 * .3 / (.9 * .3 + .7 * .1)."""
    assert against(0.9, 0.7, "probability") == pytest.approx(0.27 / (0.27 + 0.07))
    assert against(0.7, 0.7, "logit") == 0.0


def test_preferences_from_p_good_give_grpo_on_p_good() -> None:
    scores = [score("a0", 0.9), score("a1", 0.2), score("a2", 0.4)]
    found = rewarded("pairwise_grpo", Reward(), SAMPLES, scores, [], {})
    rollouts = Rollouts(
        ids=["a0", "a1", "a2"], groups=["a"] * 3, lengths=np.array([2, 2, 2]), scores=found.scores, old=np.zeros(6),
        reference=np.full(6, -0.1), strengths=found.strengths,
    )  # fmt: skip
    pairwise = estimate(rollouts, PolicyGradient(), "pairwise_grpo", 0.0).advantages
    assert pairwise == pytest.approx(estimate(rollouts, PolicyGradient(), "grpo", 0.0).advantages, abs=2e-5)


def told(first: str, second: str, strength: float | None) -> Comparison:
    reason = None if strength is not None else "the judge answers none of A, B"
    return Comparison(first[0], first, second, "referee", strength, reason)


def test_a_judges_answers_are_the_advantages_and_p_good_is_not_asked() -> None:
    """a0 beats a1 by .5 and a2 by .1 once its liking for the first place, .2, is out; b0 and b1 were not read.

    By hand: d = ((0, .5, .1), (-.5, 0, nan), (-.1, nan, 0)).  The best fit is exact: r = (.2, -.3, .1).
    """
    rows = [told("a0", "a1", 0.7), told("a1", "a0", -0.3), told("a0", "a2", 0.3), told("a2", "a0", 0.1),
            told("a1", "a2", 0.9), told("a2", "a1", None), told("b0", "b1", None), told("b1", "b0", 0.4)]  # fmt: skip
    answers = Answers.of(rows)
    found = rewarded("pairwise_grpo", Reward(judge="referee"), SAMPLES, SCORES, [], {}, answers=answers)
    assert [s.id for s in found.samples] == ["a0", "a1", "a2"]  # a2 has no score, and needs none
    assert found.counts == {"uncompared": 2, "unread_preferences": 2, "single": 0, "equal_reward": 0, "masked": 0}
    assert found.scores == pytest.approx([0.2, -0.3, 0.1], abs=1e-12)
    rollouts = Rollouts(
        ids=["a0", "a1", "a2"], groups=["a"] * 3, lengths=np.array([2, 2, 2]), scores=found.scores, old=np.zeros(6),
        strengths=found.strengths,
    )  # fmt: skip
    advantages = estimate(rollouts, PolicyGradient(), "pairwise_grpo", 0.0).advantages
    scale = math.sqrt((0.25 + 0.01) / 2 / 2 + 1e-6)
    assert advantages[::2] == pytest.approx(np.array([0.2, -0.3, 0.1]) / scale, abs=1e-9)


def test_a_judge_to_whom_all_are_equal_leaves_nothing_to_learn() -> None:
    rows = [told("b0", "b1", 0.3), told("b1", "b0", 0.3)]
    found = rewarded("pairwise_grpo", Reward(judge="r"), SAMPLES, SCORES, [], {}, answers=Answers.of(rows))
    assert list(found.samples) == [] and found.counts["equal_reward"] == 2 and found.counts["uncompared"] == 3


def test_a_judge_against_the_anchor_by_hand() -> None:
    """D .8 and -.4 in the two orders: d = .6, P(better) = .8; what was read in one order only leaves the round."""
    samples = SAMPLES | {"a3": sample("a", 3, temperature=0.0)}
    rows = [told("a0", "a3", 0.8), told("a3", "a0", -0.4), told("a1", "a3", 0.5), told("a3", "a1", None)]
    for kind, reward in (("probability", 0.8), ("logit", math.log(4))):
        found = rewarded(
            "pairwise_ppo", Reward(judge="r"), samples, [], [], {}, anchor_reward=kind, answers=Answers.of(rows)
        )
        assert [s.id for s in found.samples] == ["a0"] and found.scores[0] == pytest.approx(reward)
        assert found.counts == {"uncompared": 4, "no_greedy": 0, "unread_preferences": 1, "masked": 0}


def test_the_matrix_has_the_first_response_in_its_row() -> None:
    answers = Answers.of([told("x", "y", 0.4), told("y", "x", None)])
    found = preference_matrix(answers, ["x", "y"])
    assert found[0, 1] == 0.4 and np.isnan(found[1, 0]) and found.diagonal().tolist() == [0.0, 0.0]


def test_round_metrics_by_hand() -> None:
    """Two responses: the short one scored 0, the long one 1; the reference gives each token .1 nats less."""
    rollouts = Rollouts(
        ids=["a0", "a1"], groups=["a", "a"], lengths=np.array([1, 3]), scores=np.array([0.0, 1.0]),
        old=np.full(4, -1.0), reference=np.full(4, -1.1), values=np.zeros(4),
    )  # fmt: skip
    result = estimate(rollouts, PolicyGradient(whiten=False), "ppo", 0.0)
    found = round_metrics(rollouts, result, [sample("a", 0), sample("a", 1, "length")])
    assert found["kl"] == pytest.approx(0.2) and found["kl_k3"] == pytest.approx(2 * (math.exp(-0.1) - 1 + 0.1))
    assert (found["score_q1"], found["score_q2"]) == (0.0, 1.0) and found["cut"] == 0.5 and found["length"] == 2.0
    assert found["explained_variance"] == 0.0
