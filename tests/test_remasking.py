"""Remasking: some tokens are drawn again with the rest of the image known, for no more network evaluations."""

import torch

from speedrl.method.ratios import last_draws, token_events
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, least_likely_positions, plan_steps, rollout
from speedrl.method.schedules import checkerboard, remasked_counts, remasking_steps
from speedrl.method.scoring import positions_of
from tests.toys import Toy, sampled

GRID, LENGTH, CODES = (3, 5), 15, 3
TOY = Toy(LENGTH, CODES, grid=GRID)


def test_the_least_likely_of_the_allowed_positions_are_chosen():
    log_p = torch.tensor([[-1.0, -5.0, -3.0, -4.0], [-2.0, -2.0, -2.0, -9.0]])
    allowed = torch.tensor([[True, False, True, True], [True, True, True, False]])
    found = least_likely_positions(log_p, torch.tensor([2, 1]), allowed)
    assert found.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert not least_likely_positions(log_p, torch.tensor([0, 0]), allowed).any()
    assert torch.equal(least_likely_positions(log_p, torch.tensor([9, 9]), allowed), allowed)


def test_positions_follow_from_the_recorded_log_probabilities_alone():
    """Least likely at the latest draw first, on one colour of the checkerboard at a time, rebuilt from the record."""
    result = sampled(TOY, [8, 12, 6], remask=0.5)
    plan, colours = plan_steps(result.steps, Sampler(remask=0.5), length=LENGTH), checkerboard(*GRID)
    latest, seen = torch.zeros(3, LENGTH), 0
    for s in range(12):
        masked = result.states[:, s] == CODES
        for i in range(3):
            if count := int(plan.remasked[i, s]):
                seen += 1
                here = colours == plan.colour[i, s]
                expected = torch.zeros(LENGTH, dtype=torch.bool)
                expected[latest[i].masked_fill(~here, torch.inf).sort().indices[:count]] = True
                assert torch.equal(masked[i], expected) and count == expected.sum()
                board = masked[i].unflatten(0, GRID)
                assert not (board[1:] & board[:-1]).any() and not (board[:, 1:] & board[:, :-1]).any()
                assert torch.equal(result.kept[i, s], masked[i]), "a remasking step keeps all that it draws"
        latest = torch.where(result.kept[:, s], result.log_probs[:, s], latest)
    assert seen == 2 + 3 + 2
    colour = plan.colour[1, 9:12].tolist()
    assert colour == [0, 1, 0], "the colours in turn"


def test_the_last_steps_remask_ever_fewer_tokens_where_enough_are_left_to_reveal():
    steps = torch.tensor([1, 5, 6, 8, 11, 12, 16, 18, 32])
    assert remasking_steps(steps, share=0.5).tolist() == [0, 0, 2, 2, 2, 3, 4, 4, 8]
    assert not remasking_steps(steps, share=0.0).any()
    assert remasked_counts(4, length=256, share=0.5) == [64, 64, 32, 32]
    assert remasked_counts(3, length=256, share=0.5) == [64, 64, 32]
    assert remasked_counts(0, length=256, share=0.5) == []


def test_nothing_is_remasked_in_under_six_steps_or_at_share_0():
    for steps, share in (([1, 2, 5], 1.0), ([6, 16], 0.0)):
        plain, asked = sampled(TOY, steps), sampled(TOY, steps, remask=share)
        assert not plan_steps(torch.tensor(steps), Sampler(remask=share), length=LENGTH).remasked.any()
        assert torch.equal(plain.tokens, asked.tokens) and (asked.kept.sum(1) == 1).all()
    again = sampled(TOY, [6, 16], remask=0.5)
    assert not torch.equal(plain.tokens, again.tokens) and (again.kept.sum(1) == 2).any()


def test_remasking_takes_no_more_evaluations_and_sees_the_rest_of_the_image():
    calls = []

    class Watched(Toy):
        def __call__(self, tokens, timestep, samples, positions):
            calls.append((tokens, timestep))
            return super().__call__(tokens, timestep, samples, positions)

    policy, noise = Watched(LENGTH, CODES, grid=GRID), draw_noise(2, 8, LENGTH, seed=0)
    rollout(policy, torch.tensor([8, 8]), noise, Sampler(remask=0.5))
    assert len(calls) == 8
    for tokens, timestep in calls[6:]:
        assert ((tokens == CODES).sum(1) == round(LENGTH * 0.25)).all() and not timestep.any()


def test_remasked_tokens_are_drawn_from_sharper_logits_and_scored_by_them():
    plan = plan_steps(torch.tensor([8]), Sampler(remask=0.5), length=LENGTH)
    assert plan.logit_scale[0].tolist() == [1.0] * 6 + [1.5] * 2
    result = sampled(TOY, [8], remask=0.5)
    logits = TOY.features(result.states[:, 7], result.timestep[:, 7], torch.tensor([0]))[0] * 1.5
    expected = logits.log_softmax(-1).gather(-1, result.drawn[:, 7, :, None]).squeeze(-1)
    torch.testing.assert_close(result.log_probs[:, 7][result.kept[:, 7]], expected[result.kept[:, 7]])


def test_a_token_that_is_drawn_again_is_not_in_the_image_and_counts_for_nothing():
    """What the policy loss credits is the last draw of each position, which is what was rewarded."""
    result = sampled(TOY, [8, 12, 4], remask=0.5)
    last = last_draws(result)
    assert (last.sum(1) == 1).all() and (result.kept.sum(1) > 1).any()
    assert torch.equal((result.drawn * last).sum(1), result.tokens)
    at = positions_of(result)
    new = torch.randn(len(at.position), generator=torch.Generator().manual_seed(0))
    events = token_events(new, torch.zeros_like(new), result, at)
    weights = torch.zeros(result.states.shape).index_put(at.place, events.tokens)
    assert torch.equal(weights, last.float()), "an earlier draw weighs 0, and the last one 1"
    assert torch.equal(events.log_ratio, new) and torch.equal(events.sample, at.place[0])
    assert not weights[result.kept & ~last].any() and (result.kept & ~last).any()


def test_neighbours_on_a_checkerboard_have_different_colours():
    board = checkerboard(3, 4).view(3, 4)
    assert board[0].tolist() == [0, 1, 0, 1]
    assert (board[1:] != board[:-1]).all() and (board[:, 1:] != board[:, :-1]).all()
