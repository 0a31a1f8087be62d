"""The number of steps left, as the policy chooses it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from speedrl.models.checkpoint import Prompts, repeat, take
from speedrl.pace import Pace, advance, draw_pace, first_plan, heat, pace_log_prob, plan_logits, within
from speedrl.reward import speed_reward
from speedrl.rollout import ORDERS, draw_noise, rollout, state
from speedrl.sample import guided_policy
from speedrl.schedule import halton_order, masked_counts, temperatures
from speedrl.update import micro_batch_loss, rows


@pytest.mark.parametrize("kind", ["cosine", "linear", "square", "arccos"])
@pytest.mark.parametrize("length", [64, 256, 4096])
def test_choices_that_count_down_follow_the_fixed_schedule_to_the_bit(length, kind):
    for steps in (*range(1, 33), 48, 64):
        progress, masked = torch.zeros(1, dtype=torch.float64), torch.tensor([length])
        counts, heats = [], []
        for left in range(steps, 0, -1):
            heats.append(heat(progress, torch.tensor([left]), start=1.7))
            progress, masked = advance(progress, masked, torch.tensor([left]), length=length, kind=kind)
            counts.append(masked)
        fixed = torch.tensor([steps])
        assert torch.equal(torch.stack(counts, 1), masked_counts(fixed, length=length, kind=kind)), steps
        assert torch.equal(torch.stack(heats, 1), temperatures(fixed, start=1.7)), steps


def test_any_choices_reveal_something_at_every_step_and_one_reveals_all():
    for choices in itertools.product(range(1, 5), repeat=4):
        progress, masked = torch.zeros(1, dtype=torch.float64), torch.tensor([5])
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
    logits = within(pace(features, masked, torch.tensor([4])), 5)
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
    planned = torch.tensor([4])
    assert torch.equal(pace(features, masked, planned), pace(other, masked, planned))
    other[0, 0] += torch.randn(8)
    assert not torch.equal(pace(features, masked, planned), pace(other, masked, planned))


def test_half_precision_around_it_leaves_the_choice_in_float32():
    pace = Pace(8, 6)
    torch.nn.init.normal_(pace.out.weight)
    features, masked, planned = torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool), torch.tensor([1, 2, 6])
    plain = pace(features, masked, planned)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pace(features, masked, planned), plain) and plain.dtype == torch.float32


def test_before_any_training_the_plan_is_the_likeliest_choice():
    planned = torch.arange(1, 9)
    assert torch.equal(plan_logits(planned, 8).argmax(-1) + 1, planned)


def test_a_chosen_pace_gives_the_number_of_steps_a_gradient():
    """By enumeration of the choices: that of the expected number, and of its score function with any baseline."""
    pace = Pace(4, 3)
    features = torch.randn(1, 2, 4)
    planned, masked = torch.tensor([2]), torch.ones(1, 2, dtype=torch.bool)
    probs = pace(features, masked, planned).softmax(-1)[0]
    expected_steps = (probs * torch.arange(1, 4)).sum()
    expected_steps.backward()
    exact = pace.out.bias.grad.clone()
    assert exact.abs().max() > 0.05
    pace.zero_grad()
    logits = pace(features, masked, planned).expand(3, -1)
    score = pace_log_prob(logits, torch.arange(1, 4))
    (probs.detach() * (torch.arange(1, 4) - 7.0) * score).sum().backward()
    torch.testing.assert_close(pace.out.bias.grad, exact)


class Network(nn.Module):
    """Features that depend on every token and on the timestep, and two codes."""

    codes = 2

    def __init__(self, length: int, width: int = 4, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.length = length
        self.mix = nn.Parameter(torch.randn(length * 3, length * width, generator=random) / 2)
        self.head_weight = nn.Parameter(torch.randn(2, width, generator=random) / 2)

    def features(self, tokens, timestep, *_):
        known = nn.functional.one_hot(tokens.flatten(1), 3).flatten(1).to(self.mix)
        return torch.tanh(known @ self.mix + timestep[:, None] / 4).unflatten(1, (self.length, -1))

    def head(self, features):
        return features @ self.head_weight.T

    def forward(self, *inputs):
        return self.head(self.features(*inputs))


def sampled(network, pace, steps, *, at_most=None, sparse=True, seed=0, **options):
    length, count = network.length, len(steps)
    prompts = Prompts(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 5))
    chooser = None if at_most is None else pace
    empty = take(prompts, torch.tensor([0]))
    policy = guided_policy(network, prompts, empty, guidance=1, grid=(1, length), pace=chooser)
    noise = draw_noise(count, at_most or int(steps.max()), length, seed=seed, pace=at_most is not None)
    how = {"length": length, "mask_id": 2, "grid": (1, length), "sparse": sparse, "at_most": at_most}
    return rollout(policy, steps, noise, **how, **options)


def disturbed(most, width=4, by=0.5):
    pace = Pace(width, most)
    random = torch.Generator().manual_seed(1)
    for parameter in pace.parameters():
        parameter.data = by * torch.randn(parameter.shape, generator=random)
    return pace


class Keeps(nn.Module):
    """Keeps to the plan."""

    def forward(self, features, masked, planned):
        return torch.where(torch.arange(1, 17) == planned[:, None], 0.0, -torch.inf)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_policy_that_keeps_to_its_plan_samples_exactly_as_a_fixed_count(order, record):
    network, steps = Network(16), torch.tensor([1, 16, 5, 2, 8, 5])
    for sparse in (False, True):
        given, chosen = (
            sampled(network, Keeps(), steps, at_most=most, order=order, record=record, sparse=sparse)
            for most in (None, 16)
        )
        for name in given._fields:
            if not name.startswith("left"):
                one, other = getattr(given, name), getattr(chosen, name)
                assert (one is None and other is None) or torch.equal(one, other), name
        counting_down = (steps[:, None] - torch.arange(16)).clamp(min=0)
        assert torch.equal(chosen.left, counting_down) and (chosen.left_log_probs == 0).all()


def test_what_is_chosen_is_within_the_budget_and_replays_and_finished_samples_leave_the_batch():
    network, pace = Network(12), disturbed(6)
    seen, plain = [], network.features

    def watched(tokens, timestep, *prompts):
        seen.append((tokens.flatten(1), timestep))
        return plain(tokens, timestep)

    network.features = watched
    result = sampled(network, pace, torch.full((40,), 2), at_most=6)
    last = (result.left > 0).sum(1)
    assert torch.equal(result.steps, last) and len(set(last.tolist())) > 3 and last.max() <= 6
    exists = torch.arange(result.left.shape[1]) < result.steps[:, None]
    assert torch.equal(result.left > 0, exists)
    assert ((result.left + torch.arange(result.left.shape[1]) <= 6) | ~exists).all(), "never more than are left of six"
    assert (result.left_log_probs[exists] < 0).all() and (result.left_log_probs[~exists] == 0).all()
    assert (result.temperature[~exists] == 0).all() and (result.countdown[~exists] == 0).all()
    assert (result.reveal_step < result.steps[:, None]).all() and (result.tokens < 2).all()
    for s, (tokens, timestep) in enumerate(seen):
        unfinished = result.steps > s
        assert len(tokens) == max(2, unfinished.sum())
        if unfinished.sum() > 1:
            assert torch.equal(tokens, state(result, s, mask_id=2)[unfinished])
            assert torch.equal(timestep, result.countdown[unfinished, s])
    for s in range(1, result.left.shape[1]):  # conditioned on what the last choice leaves after its own step
        assert torch.equal(result.countdown[exists[:, s], s], result.left[exists[:, s], s - 1] - 2)


def test_a_sample_does_not_depend_on_its_batch_and_every_prompt_has_noise_of_its_own():
    network, pace = Network(12), disturbed(6)
    together = sampled(network, pace, torch.full((8,), 2), at_most=6)
    few = sampled(network, pace, torch.full((3,), 2), at_most=6)
    assert torch.equal(few.tokens, together.tokens[:3]) and torch.equal(few.steps, together.steps[:3])
    one, two = draw_noise(4, 3, 5, seed=7, pace=True), draw_noise(2, 8, 5, seed=7, first=2, pace=True)
    assert torch.equal(one.pace[2:], two.pace[:, :3]) and len(one.pace.unique()) == 12
    assert torch.equal(one.uniform, draw_noise(4, 3, 5, seed=7).uniform), "the tokens' noise is what it was"
    with pytest.raises(ValueError, match="needs noise"):
        rollout(None, torch.tensor([2]), draw_noise(1, 3, 12, seed=0), length=12, mask_id=2, at_most=3)


def test_untrained_it_explores_shorter_and_longer_ways_than_half_of_the_octaves():
    result = sampled(Network(64), Pace(4, 16), torch.full((600,), first_plan(16)), at_most=16)
    steps = result.steps.double()
    assert first_plan(16) == 4 and first_plan(1) == 1
    assert steps.quantile(0.1) <= 3 and steps.quantile(0.9) >= 12 and 6 < steps.mean() < 8


# THE GRADIENT OF THE SPEED REWARD, by enumeration: three tokens of two codes, in one to three steps


def every_outcome(network, pace, *, at_most):
    """Each outcome of a rollout once, with its probability [m]; by sampling until all were seen."""
    count = 8000
    steps = torch.randint(1, 4, (count,), generator=torch.Generator().manual_seed(0))
    steps = steps if at_most is None else torch.full_like(steps, 2)
    result = sampled(network, pace, steps, at_most=at_most, order="halton")
    key = torch.cat([result.tokens, result.steps[:, None] if at_most is None else result.left], 1)
    _, inverse = key.unique(dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), count).scatter_reduce(0, inverse, torch.arange(count), "amin")
    result = type(result)(*(None if field is None else field[first] for field in result))
    chosen = torch.full((len(first),), 1 / 3).log() if at_most is None else result.left_log_probs.sum(1)
    return result, (result.log_probs.sum(1) + chosen).exp()


def speed_gradient(network, pace, *, at_most):
    """The gradient that the update makes of the speed reward alone, in expectation over every outcome."""
    result, probability = every_outcome(network, pace, at_most=at_most)
    assert probability.sum().item() == pytest.approx(1, abs=1e-5), "every outcome once, each with its probability"
    assert len(probability) == (3 * 8 if at_most is None else 5 * 8)
    count = len(probability)
    part = rows(result, torch.arange(3) < result.steps[:, None], mask_id=2)
    prompts = Prompts(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 5))
    loss, stats = micro_batch_loss(
        network, None, result, part, take(prompts, part.sample),
        repeat(take(prompts, torch.tensor([0])), len(part.sample)),
        speed_reward(result.steps, max_steps=3)[:, None].expand(-1, 3),
        probability[:, None].expand(-1, 3), grid=(1, 3), guidance=1.0, reference_guidance=1.0, order="halton",
        likelihood="token", clip_range=0.2, kl="none", kl_weight=0.0, pace=None if at_most is None else pace,
        pace_weight=1.0,
    )  # fmt: skip
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-5)
    loss.backward()
    return {name: -p.grad for part in (network, pace) for name, p in part.named_parameters() if p.grad is not None}


def expected_steps(network, pace, *, at_most, tokens=None, progress=0.0, s=0, planned=2):
    """The expected number of steps from a state, in float64, with formulas of its own."""
    tokens = torch.full((1, 3), 2) if tokens is None else tokens
    masked = (tokens == 2)[0]
    if not masked.any():
        return 0.0
    features = network.features(tokens.view(1, 1, 3), torch.tensor([planned - 1]))[0]
    pooled = features[masked].mean(0)
    normed = (pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-5).sqrt()
    scores = [
        (pace.out.weight[k - 1] @ normed + pace.out.bias[k - 1]).item()
        - 2 * (torch.tensor(k / planned, dtype=torch.float64).log2().item()) ** 2
        for k in range(1, at_most - s + 1)
    ]
    total, codes = 1.0, network.head(features).softmax(-1)
    turn = [i for i in halton_order(1, 3).argsort().tolist() if masked[i]]
    for left, share in enumerate(torch.tensor(scores, dtype=torch.float64).softmax(0).tolist(), 1):
        after, kept = advance(
            torch.tensor([progress], dtype=torch.float64), masked.sum()[None], torch.tensor([left]), length=3
        )
        places = turn[: len(turn) - int(kept)]
        for outcome in itertools.product((0, 1), repeat=len(places)):
            known, likely = tokens.clone(), share
            for place, code in zip(places, outcome, strict=True):
                known[0, place] = code
                likely *= codes[place, code].item()
            way = {"tokens": known, "progress": after.item(), "s": s + 1, "planned": left - 1}
            total += likely * expected_steps(network, pace, at_most=at_most, **way)
    return total


def test_speed_has_no_expected_gradient_where_steps_are_drawn_and_the_true_one_where_the_policy_chooses():
    network, pace = Network(3), disturbed(3)
    drawn = speed_gradient(copy.deepcopy(network), copy.deepcopy(pace), at_most=None)
    assert drawn.keys() == {"mix", "head_weight"}
    assert all(gradient.abs().max() < 1e-6 for gradient in drawn.values())
    chosen = speed_gradient(network, pace, at_most=3)
    assert chosen.keys() == {"mix", "head_weight", "out.weight", "out.bias"}
    assert chosen["out.bias"].abs().max() > 0.03 and chosen["mix"].abs().max() > 1e-3
    network, pace = network.double(), pace.double()
    named = dict(network.named_parameters()) | dict(pace.named_parameters())
    compared = [("out.bias", 0), ("out.bias", 1), ("out.bias", 2), ("out.weight", 1), ("out.weight", 6)]
    compared += [("head_weight", 3), *(("mix", int(i)) for i in chosen["mix"].abs().flatten().topk(3).indices)]
    with torch.no_grad():
        for name, place in compared:
            value, found = named[name].view(-1), []
            for move in (1e-5, -2e-5):
                value[place] += move
                found.append(1 - expected_steps(network, pace, at_most=3) / 3)  # the speed reward
            value[place] += 1e-5
            exact = (found[0] - found[1]) / 2e-5
            assert chosen[name].flatten()[place].item() == pytest.approx(exact, abs=2e-6, rel=1e-3), (name, place)
