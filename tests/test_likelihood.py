"""Likelihoods, by enumeration of every trajectory of tiny cases."""

import itertools
import math
from collections import Counter

import pytest
import torch

from speedrl.method.likelihoods import guided, log_probs, plackett_luce, sample_tokens, step_log_prob
from speedrl.method.ratios import LIKELIHOODS, needs_all_drawn
from speedrl.method.schedules import masked_counts
from speedrl.method.search import Scalars
from tests.toys import Toy, every_trajectory, log_likelihood, sampled

GRID, LENGTH = (1, 3), 3
TOY = Toy(LENGTH, 2, seed=1)
SMALL = Toy(2, 2, seed=2)
SCALARS = Scalars(*(torch.tensor([x]) for x in (1.2, 0.7, 1.5, 2.0)))
CASES = [
    (TOY, 1, "confidence", {}), (TOY, 2, "confidence", {}), (TOY, 2, "confidence", {"schedule": "linear"}),
    (TOY, 2, "confidence", {"schedule": "arccos"}), (TOY, 2, "confidence", {"scalars": SCALARS}),
    (TOY, 2, "random", {"schedule": "linear"}), (TOY, 2, "random", {"schedule": "square"}),
    (TOY, 2, "halton", {"schedule": "linear"}), (TOY, 3, "halton", {"schedule": "arccos"}),
    # six steps, of which the last two remask
    (SMALL, 6, "confidence", {"remask": 1.0}), (SMALL, 6, "random", {"remask": 1.0}),
]
NAMES = [f"{steps} steps, {order}, {', '.join(how) or 'plain'}" for _, steps, order, how in CASES]


def enumerated(toy: Toy, steps: int, order: str, how: dict):
    return every_trajectory(toy, steps, order=order, **how)


@pytest.mark.parametrize(("toy", "steps", "order", "how"), CASES, ids=NAMES)
def test_exact_probabilities_sum_to_one_and_their_score_has_mean_zero(toy, steps, order, how):
    policy = toy.moved(0.0)
    trajectories = enumerated(policy, steps, order, how)
    log_p = log_likelihood(policy, trajectories, order=order)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    (score,) = torch.autograd.grad((log_p.exp().detach() * log_p).sum(), policy.weights)
    torch.testing.assert_close(score, torch.zeros_like(score), atol=1e-5, rtol=0)
    single = torch.autograd.grad(log_likelihood(policy, trajectories[:1], order=order).sum(), policy.weights)[0]
    assert single.abs().max() > 0.1


@pytest.mark.parametrize(("toy", "steps", "order", "how"), [c for c in CASES if "scalars" not in c[3]],
                         ids=[n for n in NAMES if "scalars" not in n])
def test_rollouts_have_the_enumerated_distribution(toy, steps, order, how):
    count, trajectories = 4000, enumerated(toy, steps, order, how)

    def outcome(trajectory, i: int) -> tuple:
        return (*trajectory.tokens[i].tolist(), *trajectory.kept[i].flatten().tolist())

    expected = Counter()
    for i, p in enumerate(log_likelihood(toy, trajectories, order=order).exp().tolist()):
        expected[outcome(trajectories, i)] += p
    result = sampled(toy, [steps] * count, order=order, **how)
    found = Counter(map(tuple, torch.cat([result.tokens, result.kept.flatten(1).long()], 1).tolist()))
    assert set(found) <= set(expected)
    for key, p in expected.items():
        assert found[key] / count == pytest.approx(p, abs=4.5 * math.sqrt(p * abs(1 - p) / count) + 1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_surrogate_sums_to_the_number_of_position_choices(schedule):
    """log p of the kept tokens alone counts every set of positions in full: C(n, k), not 1."""
    reveals = LENGTH - int(masked_counts(torch.tensor([2]), length=LENGTH, kind=schedule)[0, 0])
    found = every_trajectory(TOY, 2, order="random", schedule=schedule)
    total = (found.log_probs * found.kept).sum((1, 2)).exp().sum().item()
    assert total == pytest.approx(math.comb(LENGTH, reveals), abs=1e-5) and total > 1.5


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_gradient_of_the_expected_reward_agrees_with_finite_differences(order):
    policy = TOY.moved(0.0)
    trajectories = every_trajectory(policy, 2, order=order, schedule="linear")
    reward = trajectories.tokens.sum(1) + 0.5 * trajectories.kept[:, 1, 0]  # of tokens and of their order
    log_p = log_likelihood(policy, trajectories, order=order)
    (gradient,) = torch.autograd.grad((log_p.exp().detach() * log_p * reward).sum(), policy.weights)
    assert gradient.abs().max() > 0.02

    def expected_reward(weights: torch.Tensor) -> float:
        there = Toy(LENGTH, 2, weights=weights)
        return (log_likelihood(there, trajectories, order=order).exp() * reward).sum().item()

    for index in [(2, 0), (2, 3), (5, 1), (0, 4)]:
        shift = torch.zeros_like(gradient)
        shift[index] = 0.02
        weights = policy.weights.detach()
        found = (expected_reward(weights + shift) - expected_reward(weights - shift)) / 0.04
        assert found == pytest.approx(gradient[index].item(), abs=5e-4)


def test_plackett_luce_sums_to_one_over_ordered_choices():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0])
    candidates = torch.tensor([True, True, True, True, False])  # the last is not masked, whatever its score
    total = 0.0
    for chosen in itertools.permutations(range(4), 2):
        rank, revealed = torch.full((5,), 4), torch.zeros(5, dtype=torch.bool)
        for place, i in enumerate(chosen):
            rank[i], revealed[i] = place, True
        first, rest = scores[:4].exp(), scores[:4].exp().sum()
        by_hand = first[chosen[0]] / rest * first[chosen[1]] / (rest - first[chosen[0]])
        value = plackett_luce(scores, rank, candidates, revealed).exp()
        assert value.item() == pytest.approx(by_hand.item(), abs=1e-6)
        total += value.item()
    assert total == pytest.approx(1, abs=1e-6)


def test_plackett_luce_gradient_agrees_with_finite_differences_and_spares_non_candidates():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 5.0], requires_grad=True)
    candidates = torch.tensor([True, True, True, True, False])
    revealed = torch.tensor([False, True, True, False, False])
    rank = torch.tensor([3, 1, 0, 2, 4])
    (gradient,) = torch.autograd.grad(plackett_luce(scores, rank, candidates, revealed), scores)
    assert gradient.isfinite().all() and gradient[4] == 0 and gradient[0] < 0 < gradient[1]
    for i in range(4):
        shift = torch.zeros(5)
        shift[i] = 0.01
        with torch.no_grad():
            up = plackett_luce(scores + shift, rank, candidates, revealed)
            down = plackett_luce(scores - shift, rank, candidates, revealed)
        assert ((up - down) / 0.02).item() == pytest.approx(gradient[i].item(), abs=1e-3)


def test_deterministic_and_last_steps_have_no_order_term():
    log_p = torch.tensor([[-0.5, -1.0, -2.0]] * 3, requires_grad=True)
    rank = torch.tensor([[0, 1, 2]] * 3)
    masked = torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    revealed = torch.tensor([[True, False, False], [True] * 3, [False] * 3])
    value, terms = step_log_prob(log_p, rank, masked, revealed, torch.tensor([0.0, 1.0, 1.0]))
    assert value.tolist() == [-3.5, -3.5, 0] and terms.tolist() == [3, 3, 0]
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert torch.equal(gradient, masked.float())
    _, terms = step_log_prob(log_p, rank, masked, revealed, torch.tensor([0.5, 1.0, 1.0]))
    assert terms.tolist() == [4, 3, 0]


def test_guidance_interpolates_and_extrapolates():
    cond, uncond = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([0.5, 4.0]).bfloat16()
    assert guided(cond, uncond, 1.0).tolist() == [1, 2] and guided(cond, uncond, 0.0).tolist() == [0.5, 4]
    assert guided(cond, uncond, 3.0).tolist() == [2, -2] and guided(cond, uncond, 3.0).dtype == torch.float32


def test_log_probs_are_float32_and_normalised():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.stack([log_probs(logits, torch.full((4,), v)) for v in range(7)], -1)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, logits.float().log_softmax(-1))


def test_sampling_never_draws_a_code_of_probability_zero():
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]])
    uniform = torch.tensor([0.0, 2**-24, 0.2689, 0.5, 1 - 2**-24, 1.0])
    tokens, log_p = sample_tokens(logits.expand(6, 5), uniform)
    assert tokens.tolist() == [1, 1, 1, 3, 3, 3] and log_p.isfinite().all()
    wide = torch.full((1, 8192), -inf)
    wide[0, 4000:4003] = torch.tensor([3.0, -80.0, 1.0])
    tokens, _ = sample_tokens(wide.expand(2001, -1), torch.linspace(0, 1 - 2**-24, 2001))
    assert set(tokens.tolist()) <= {4000, 4001, 4002} and {4000, 4002} <= set(tokens.tolist())


def test_sampling_inverts_the_distribution_function():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    tokens, log_p = sample_tokens(logits.expand(1000, 4), (torch.arange(1000) + 0.5) / 1000)
    assert tokens.bincount().tolist() == [100, 200, 300, 400]
    assert torch.equal(log_p, log_probs(logits.expand(1000, 4), tokens))


@pytest.mark.parametrize("codes", [5, 32, 1000])
def test_sampling_in_two_levels_is_sampling_in_one(codes):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, codes, generator=generator)
    logits[:, 1:3] = -torch.inf
    uniform = torch.rand(4000, generator=generator)
    tokens, log_p = sample_tokens(logits, uniform)
    # in double precision, where no running sum is off by a rounding
    expected = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniform.double()[:, None], right=True)
    assert (tokens != expected.squeeze(-1)).float().mean() < 2e-3, "but for draws at the edge of two codes"
    assert torch.equal(log_p, log_probs(logits, tokens)) and log_p.isfinite().all()


def test_only_the_exact_likelihood_of_confidence_order_scores_what_was_discarded():
    found = {(k, o) for k in ("token", "sequence", "exact") for o in ("confidence", "random", "halton")
             if needs_all_drawn(LIKELIHOODS[k], o)}
    assert found == {("exact", "confidence")}
    with pytest.raises(ValueError, match="'best'"):
        ones = torch.ones(1, 2, dtype=torch.bool)
        step_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), ones, ones, torch.ones(1), order="best")
