"""Likelihoods, by enumeration of every outcome of tiny cases."""

import itertools
import math
from collections import Counter

import pytest
import torch

from speedrl.method.likelihoods import exact_log_prob, guided, log_probs, log_ratio, plackett_luce, sample_tokens
from speedrl.method.sampling import draw_noise, rollout, state
from speedrl.method.schedules import halton_order, masked_counts, temperatures, timesteps

LENGTH, CODES, MASK = 3, 2, 2


def parameters() -> torch.Tensor:
    return torch.randn(LENGTH * (CODES + 1), LENGTH * CODES, generator=torch.Generator().manual_seed(1))


def policy(weights: torch.Tensor, tokens: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    features = torch.nn.functional.one_hot(tokens, CODES + 1).flatten(1).float()
    return (features @ weights).view(-1, LENGTH, CODES) * (1 + timestep[:, None, None] / 4)


def outcomes(weights: torch.Tensor, steps: int, *, schedule: str, order: str) -> list[tuple]:
    """Every trajectory: (exact log-probability, surrogate log-probability, final tokens, reveal steps)."""
    n = torch.tensor([steps])
    masked_after = masked_counts(n, length=LENGTH, kind=schedule)[0].tolist()
    heat, countdown = temperatures(n), timesteps(n)
    partial = [(torch.zeros(()), torch.zeros(()), [MASK] * LENGTH, [0] * LENGTH)]
    for s in range(steps):
        grown = []
        for exact, surrogate, tokens, reveal in partial:
            positions = [i for i in range(LENGTH) if tokens[i] == MASK]
            reveals = len(positions) - masked_after[s]
            logits = policy(weights, torch.tensor([tokens]), countdown[:, s])
            masked = torch.tensor([[t == MASK for t in tokens]])
            if order == "random":  # an outcome is a set of positions and its tokens
                chosen_orders = itertools.combinations(positions, reveals)
            elif order == "halton":  # the positions are always the same
                chosen_orders = [tuple(sorted(positions, key=halton_order(1, LENGTH).tolist().__getitem__)[:reveals])]
            elif reveals == len(positions):  # the order within a last step is no part of the event
                chosen_orders = [tuple(positions)]
            else:
                chosen_orders = itertools.permutations(positions, reveals)
            for chosen in chosen_orders:
                drawn_at = positions if order == "confidence" else chosen
                for values in itertools.product(range(CODES), repeat=len(drawn_at)):
                    draw = {**dict.fromkeys(range(LENGTH), 0), **dict(zip(drawn_at, values, strict=True))}
                    log_p = log_probs(logits, torch.tensor([[draw[i] for i in range(LENGTH)]]))
                    rank = torch.full((1, LENGTH), LENGTH)
                    revealed = torch.zeros(1, LENGTH, dtype=torch.bool)
                    for place, i in enumerate(chosen):
                        rank[0, i], revealed[0, i] = place, True
                    value, _ = exact_log_prob(log_p, rank, masked, revealed, heat[:, s], order=order)
                    grown.append(
                        (
                            exact + value[0],
                            surrogate + log_p[revealed].sum(),
                            [draw[i] if i in chosen else t for i, t in enumerate(tokens)],
                            [s if i in chosen else r for i, r in enumerate(reveal)],
                        )
                    )
        partial = grown
    return partial


CASES = [
    (2, "cosine", "confidence"), (2, "linear", "confidence"), (2, "arccos", "confidence"), (1, "cosine", "confidence"),
    (2, "linear", "random"), (2, "square", "random"), (2, "linear", "halton"), (3, "arccos", "halton"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "schedule", "order"), CASES)
def test_exact_probabilities_sum_to_one_and_their_score_has_mean_zero(steps, schedule, order):
    weights = parameters().requires_grad_()
    log_p = torch.stack([o[0] for o in outcomes(weights, steps, schedule=schedule, order=order)])
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    (score,) = torch.autograd.grad((log_p.exp().detach() * log_p).sum(), weights)
    torch.testing.assert_close(score, torch.zeros_like(score), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "schedule", "order"),
    [(2, "linear", "confidence"), (2, "square", "confidence"), (2, "cosine", "random"), (3, "linear", "halton")],
)
def test_rollouts_have_the_enumerated_distribution(steps, schedule, order):
    weights, count = parameters(), 20000
    expected = Counter()
    for log_p, _, tokens, reveal in outcomes(weights, steps, schedule=schedule, order=order):
        expected[(*tokens, *reveal)] += log_p.exp().item()
    result = rollout(
        lambda tokens, timestep: policy(weights, tokens, timestep),
        torch.full((count,), steps),
        draw_noise(count, steps, LENGTH, seed=0),
        length=LENGTH,
        mask_id=MASK,
        schedule=schedule,
        order=order,
        grid=(1, LENGTH),
    )
    found = Counter(map(tuple, torch.cat([result.tokens, result.reveal_step], 1).tolist()))
    assert set(found) <= set(expected)
    for outcome, p in expected.items():
        assert found[outcome] / count == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / count) + 1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_surrogate_sums_to_the_number_of_position_choices(schedule):
    """log p of the revealed tokens alone counts every set of positions in full: C(n, k), not 1."""
    reveals = LENGTH - int(masked_counts(torch.tensor([2]), length=LENGTH, kind=schedule)[0, 0])
    found = outcomes(parameters(), 2, schedule=schedule, order="random")
    total = torch.stack([surrogate for _, surrogate, _, _ in found]).exp().sum().item()
    assert total == pytest.approx(math.comb(LENGTH, reveals), abs=1e-5)
    assert total > 1.5


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_gradient_of_the_expected_reward_agrees_with_finite_differences(order):
    def expected_reward(weights, *, score):
        found = outcomes(weights, 2, schedule="linear", order=order)
        log_p = torch.stack([o[0] for o in found])
        reward = torch.tensor([float(sum(o[2]) + 0.5 * o[3][0]) for o in found])
        p = log_p.exp()
        return ((p.detach() * log_p if score else p) * reward).sum()

    weights = parameters().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_reward(weights, score=True), weights)
    assert gradient.abs().max() > 0.02
    for index in [(2, 0), (2, 3), (5, 1), (0, 4)]:
        shift = torch.zeros_like(weights)
        shift[index] = 0.02
        with torch.no_grad():
            up, down = expected_reward(weights + shift, score=False), expected_reward(weights - shift, score=False)
        assert ((up - down) / 0.04).item() == pytest.approx(gradient[index].item(), abs=5e-4)


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
    value, terms = exact_log_prob(log_p, rank, masked, revealed, torch.tensor([0.0, 1.0, 1.0]))
    assert value.tolist() == [-3.5, -3.5, 0] and terms.tolist() == [3, 3, 0]
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert torch.equal(gradient, masked.float())
    _, terms = exact_log_prob(log_p, rank, masked, revealed, torch.tensor([0.5, 1.0, 1.0]))
    assert terms.tolist() == [4, 3, 0]


def test_recorded_exact_log_probs_are_those_of_a_replay():
    weights, steps = parameters(), torch.tensor([1, 2, 3, 3])
    result = rollout(
        lambda tokens, timestep: policy(weights, tokens, timestep),
        steps,
        draw_noise(4, 3, LENGTH, seed=5),
        length=LENGTH,
        mask_id=MASK,
        record=True,
    )
    for s in range(3):
        before = state(result, s, mask_id=MASK)
        log_p = log_probs(policy(weights, before, timesteps(steps)[:, s]), result.drawn[:, s])
        revealed = (result.reveal_step == s) & (before == MASK)
        value, terms = exact_log_prob(log_p, result.rank[:, s], before == MASK, revealed, temperatures(steps)[:, s])
        assert torch.equal(value, result.exact[:, s]) and torch.equal(terms, result.terms[:, s])
    assert (result.exact.sum(1) < 0).all()


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


def test_likelihood_levels():
    new = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -3.0, -3.5], [-1.0, -1.0, -1.0]], requires_grad=True)
    assert log_ratio(new, old).tolist() == [[0, 1, -0.5], [0, 0, 0]]
    sequence = log_ratio(new, old, level="sequence")
    torch.testing.assert_close(sequence, torch.tensor([[1 / 6] * 3, [0.0] * 3]))
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert log_ratio(new, old, level="sequence", weights=weights).tolist() == [[1] * 3, [0] * 3]
    exact = log_ratio(new.sum(1), old.sum(1), level="exact", terms=torch.tensor([5, 0]))
    torch.testing.assert_close(exact, torch.tensor([[0.1], [0.0]]))
    new_gradient, old_gradient = torch.autograd.grad(sequence[0, 0], (new, old), allow_unused=True)
    torch.testing.assert_close(new_gradient, torch.tensor([[1 / 3] * 3, [0.0] * 3]))
    assert old_gradient is None
    with pytest.raises(ValueError, match="terms"):
        log_ratio(new[:, 0], old[:, 0], level="exact")
    with pytest.raises(ValueError, match="'word'"):
        log_ratio(new, old, level="word")


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
