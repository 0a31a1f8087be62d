"""The speed reward: its formula, and when it has a gradient at all."""

import pytest
import torch

from speedrl.method.likelihoods import exact_log_prob, log_probs
from speedrl.method.rewards import combine, speed_reward


def test_speed_is_the_share_of_calls_saved():
    reward = speed_reward(torch.tensor([16, 8, 4, 1, 32]), max_steps=16)
    assert reward.tolist() == [0, 0.5, 0.75, 0.9375, -1] and reward.dtype == torch.float32
    with pytest.raises(ValueError, match="max_steps"):
        speed_reward(torch.tensor([1]), max_steps=0)


def test_combination_weighs_speed_and_gates_it_by_quality():
    quality, speed = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1.0, 0.5, -1.0])
    torch.testing.assert_close(combine(quality, speed, steps_reward=0.5), torch.tensor([0.6, 0.75, 0.4]))
    torch.testing.assert_close(combine(quality, speed, steps_reward=0.5, gate=0.5), torch.tensor([0.1, 0.75, 0.4]))
    assert torch.equal(combine(quality, speed, steps_reward=0.0), quality)


def trajectories(first: torch.Tensor, second: torch.Tensor, steps: int) -> torch.Tensor:
    """Exact log-probabilities of all trajectories of two tokens over two codes in 1 or 2 steps.

    first [2, 2]: logits at each position, both masked; second [2, 2]: logits at the last masked one, by the other's
    token. Reveals one token by confidence at temperature 2, then the other.
    """
    codes, found = torch.arange(2), []
    both = torch.ones(1, 2, dtype=torch.bool)
    for a in codes:
        for b in codes:
            log_p = log_probs(first, torch.stack([a, b]))[None]
            if steps == 1:
                found.append(exact_log_prob(log_p, torch.tensor([[0, 1]]), both, both, torch.ones(1))[0][0])
                continue
            for position, token in ((0, a), (1, b)):
                revealed = torch.zeros(1, 2, dtype=torch.bool)
                revealed[0, position] = True
                rank = torch.tensor([[position, 1 - position]])
                step_one, _ = exact_log_prob(log_p, rank, both, revealed, torch.tensor([2.0]))
                found.extend(step_one[0] + log_probs(second[token], c) for c in codes)
    return torch.stack(found)


def expected_speed_gradient(logits, *, chosen: torch.Tensor | None):
    """Gradient of the score-function estimate of the expected speed reward, over every outcome."""
    tables = logits.requires_grad_()
    log_n = torch.full((2,), 0.5).log() if chosen is None else chosen.log_softmax(-1)
    total = torch.zeros(())
    for index, steps in enumerate((1, 2)):
        log_p = log_n[index] + trajectories(tables[0], tables[1], steps)
        reward = speed_reward(torch.tensor([steps]), max_steps=4)
        total = total + (log_p.exp().detach() * log_p * reward).sum()
    wanted = [tables] if chosen is None else [tables, chosen]
    return torch.autograd.grad(total, wanted)


def tables() -> torch.Tensor:
    return torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))


def test_probabilities_of_the_toy_sum_to_one():
    for steps, count in ((1, 4), (2, 16)):
        log_p = trajectories(*tables(), steps)
        assert len(log_p) == count and log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_speed_has_no_expected_gradient_where_the_step_count_is_given():
    (gradient,) = expected_speed_gradient(tables(), chosen=None)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_speed_has_the_true_gradient_where_the_policy_chooses_the_step_count():
    chosen = torch.tensor([0.2, -0.3], requires_grad=True)
    tokens_gradient, gradient = expected_speed_gradient(tables(), chosen=chosen)
    expected_speed = (chosen.softmax(-1) * speed_reward(torch.tensor([1, 2]), max_steps=4)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected_speed, chosen)[0])
    assert gradient[0] > 0.05  # towards fewer steps
    torch.testing.assert_close(tokens_gradient, torch.zeros_like(tokens_gradient), atol=1e-6, rtol=0)
