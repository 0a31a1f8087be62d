"""The number of steps left, as the policy chooses it."""

import itertools

import pytest
import torch

from speedrl.pace import Pace, advance, draw_pace, pace_log_prob, plan_logits
from speedrl.schedule import masked_counts


@pytest.mark.parametrize("kind", ["cosine", "linear", "square", "arccos"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
def test_choices_that_count_down_follow_the_fixed_schedule(steps, kind):
    progress, masked, found = torch.zeros(1), torch.tensor([256]), []
    for left in range(steps, 0, -1):
        progress, masked = advance(progress, masked, torch.tensor([left]), length=256, kind=kind)
        found.append(int(masked))
    wanted = masked_counts(torch.tensor([steps]), length=256, kind=kind)[0].tolist()
    assert found[-1] == 0 and all(abs(a - b) <= 1 for a, b in zip(found, wanted, strict=True))


def test_any_choices_reveal_something_at_every_step_and_one_reveals_all():
    for choices in itertools.product(range(1, 5), repeat=4):
        progress, masked = torch.zeros(1), torch.tensor([5])
        for left in choices:
            before = int(masked)
            progress, masked = advance(progress, masked, torch.tensor([left]), length=5)
            assert int(masked) < before and (left > 1 or int(masked) == 0)
            if int(masked) == 0:
                break


def test_draws_have_the_distribution_of_the_logits_and_keep_to_the_budget():
    pace = Pace(8, 6)
    torch.nn.init.normal_(pace.out.weight)
    features, masked = torch.randn(1, 4, 8), torch.tensor([[True, True, False, True]])
    logits = pace(features, masked, torch.tensor([4]), torch.tensor([5]))
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = draw_pace(logits.expand(20_000, -1), uniform)
    share = torch.bincount(drawn, minlength=7)[1:] / 20_000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=2e-4, rtol=0)
    assert share[5] == 0
    every = torch.stack([pace_log_prob(logits, torch.tensor([left])) for left in range(1, 6)])
    torch.testing.assert_close(every.exp().sum(), torch.tensor(1.0))


def test_what_is_known_of_revealed_positions_plays_no_part():
    pace = Pace(8, 6)
    torch.nn.init.normal_(pace.out.weight)
    features, masked = torch.randn(1, 4, 8), torch.tensor([[True, True, False, True]])
    other = features.clone()
    other[0, 2] += 1
    ask = (torch.tensor([4]), torch.tensor([6]))
    assert torch.equal(pace(features, masked, *ask), pace(other, masked, *ask))
    other[0, 0] += torch.randn(8)
    assert not torch.equal(pace(features, masked, *ask), pace(other, masked, *ask))


def test_before_any_training_the_plan_is_the_likeliest_choice():
    planned = torch.arange(1, 9)
    assert torch.equal(plan_logits(planned, 8).argmax(-1) + 1, planned)


def test_a_chosen_pace_gives_the_number_of_steps_a_gradient():
    """By enumeration of the choices: that of the expected number, and of its score function with any baseline."""
    pace = Pace(4, 3)
    features = torch.randn(1, 2, 4)
    planned, masked = torch.tensor([2]), torch.ones(1, 2, dtype=torch.bool)
    probs = pace(features, masked, planned, torch.tensor([3])).softmax(-1)[0]
    expected_steps = (probs * torch.arange(1, 4)).sum()
    expected_steps.backward()
    exact = pace.out.bias.grad.clone()
    assert exact.abs().max() > 0.05
    pace.zero_grad()
    logits = pace(features, masked, planned, torch.tensor([3])).expand(3, -1)
    score = pace_log_prob(logits, torch.arange(1, 4))
    (probs.detach() * (torch.arange(1, 4) - 7.0) * score).sum().backward()
    torch.testing.assert_close(pace.out.bias.grad, exact)
