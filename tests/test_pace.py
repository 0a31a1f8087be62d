"""When the policy stops: the decisions, what they lead to, and the gradient of the reward through them."""

import itertools

import pytest
import torch
from torch import nn

from speedrl.generation import guided_policy
from speedrl.method.rewards import combine, speed_reward
from speedrl.method.sampling import draw_noise, rollout
from speedrl.models.checkpoint import Prompts, repeat, take
from speedrl.pace import Pace, divided, every_stop, expected, stop_log_probs, summary, until_stop
from speedrl.updates import micro_batch_loss, pace_gradient, rows

MASK = 2


def disturbed(width, most, by=0.5):
    pace = Pace(width, most)
    random = torch.Generator().manual_seed(1)
    for parameter in pace.parameters():
        parameter.data = by * torch.randn(parameter.shape, generator=random)
    return pace


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


def revealed(network, steps, *, most, grid, seed=0):
    """Finished rollouts with their summaries, the policy and the noise of all steps."""
    count = len(steps)
    prompts = Prompts(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 5))
    policy = guided_policy(network, prompts, take(prompts, torch.tensor([0])), guidance=1, grid=grid, summarise=True)
    noise = draw_noise(count, most, network.length, seed=seed)
    how = {"length": network.length, "mask_id": MASK, "grid": grid, "sparse": True, "summarise": True}
    return rollout(policy, steps, noise, **how), policy, noise.uniform


def test_half_of_the_steps_reveal_and_the_rest_are_sweeps_of_two():
    assert [divided(most) for most in (3, 4, 5, 6, 7, 8, 16)] == [
        (1, 1), (2, 1), (2, 1), (3, 1), (3, 2), (4, 2), (8, 4)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="3 steps at the least"):
        divided(2)


def test_probabilities_of_all_stops_are_those_of_the_decisions_one_after_another():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    on = logits.sigmoid()
    by_hand = torch.stack(
        [1 - on[:, 0], on[:, 0] * (1 - on[:, 1]), on[:, 0] * on[:, 1] * (1 - on[:, 2]), on.prod(1)], 1
    )
    torch.testing.assert_close(stop_log_probs(logits).exp(), by_hand)
    torch.testing.assert_close(by_hand.sum(1), torch.ones(5))
    values = torch.randn(5, 4)
    torch.testing.assert_close(expected(logits, values), (by_hand * values).sum(1))
    assert stop_log_probs(torch.tensor([[-200.0, 0.0]]))[0].isfinite().all()
    assert torch.equal(expected(torch.zeros(2, 0), torch.tensor([[3.0], [4.0]])), torch.tensor([3.0, 4.0]))


def test_the_summary_is_of_the_masked_places_alone_and_decisions_stay_in_float32():
    features, masked = torch.randn(1, 4, 8), torch.tensor([[True, True, False, True]])
    torch.testing.assert_close(summary(features, masked), features[:, [0, 1, 3]].mean(1))
    pace, known = disturbed(8, 7), torch.randn(3, 2, 8)
    plain = pace(known)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pace(known), plain) and plain.dtype == torch.float32
    torch.testing.assert_close(pace(known[:, 1:], first=1), plain[:, 1:])
    torch.testing.assert_close(pace(5 * known + 1), plain, atol=1e-4, rtol=0)  # directions count, no lengths


def test_the_rollout_keeps_the_summary_of_each_samples_last_step():
    network, seen = Network(6), []
    plain = network.features
    network.features = lambda tokens, timestep, *rest: seen.append((tokens, plain(tokens, timestep))) or seen[-1][1]
    result, _, _ = revealed(network, torch.tensor([3, 1, 2, 3]), most=3, grid=(2, 3))
    for sample, (step, row) in enumerate([(2, 0), (0, 1), (1, None), (2, 1)]):
        tokens, features = seen[step]
        row = list((result.steps > step).nonzero().squeeze(1)).index(sample) if row is None else row
        masked = tokens.flatten(1) == MASK
        torch.testing.assert_close(result.summary[sample], summary(features, masked)[row])


def test_pictures_that_stop_are_those_of_every_stop_whatever_the_batch():
    network, pace = Network(6), disturbed(4, 8, by=3.0)
    result, policy, uniform = revealed(network, torch.full((200,), 4), most=8, grid=(2, 3))
    how = {"share": 0.7, "mask_id": MASK, "grid": (2, 3), "sharpness": torch.rand(200) + 0.5}
    logits = every_stop(policy, pace, result, uniform, **how).logits
    pace.out.bias.data -= logits.median(0).values  # each decision goes either way for half
    stops = every_stop(policy, pace, result, uniform, **how)
    assert stops.tokens.shape == (200, 3, 6) and stops.known.shape == (200, 2, 4) and stops.logits.shape == (200, 2)
    torch.testing.assert_close(stops.logits, pace(stops.known))
    assert torch.equal(stops.tokens[:, 0], result.tokens) and (stops.tokens < MASK).all()
    assert (stops.tokens[:, 1:] != stops.tokens[:, :-1]).any(2).any(0).all(), "every sweep changes something somewhere"
    tokens, steps = until_stop(policy, pace, result, uniform, sweeps=2, **how)
    on = stops.logits > 0
    sweeps = on[:, 0].long() + (on[:, 0] & on[:, 1])
    assert set(sweeps.tolist()) == {0, 1, 2} and torch.equal(steps, 4 + 2 * sweeps)
    assert torch.equal(tokens, stops.tokens[torch.arange(200), sweeps])
    assert torch.equal(until_stop(policy, pace, result, uniform, sweeps=0, **how)[0], result.tokens)
    once = until_stop(policy, pace, result, uniform, sweeps=1, **how)
    assert torch.equal(once[1], 4 + 2 * sweeps.clamp(max=1))
    alone = every_stop(policy, None, result, uniform, **how)
    assert torch.equal(alone.tokens[:, 0], result.tokens) and alone.logits.shape == (200, 0)


# THE GRADIENT OF THE SPEED REWARD, by enumeration: three tokens of two codes


def every_outcome(network, *, count=8000):
    """Each outcome of a rollout in 1 to 3 drawn steps once, with its probability [m]: sampled until all are seen."""
    steps = torch.randint(1, 4, (count,), generator=torch.Generator().manual_seed(0))
    prompts = Prompts(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 5))
    policy = guided_policy(network, prompts, take(prompts, torch.tensor([0])), guidance=1, grid=(1, 3))
    how = {"length": 3, "mask_id": MASK, "grid": (1, 3), "order": "halton"}
    result = rollout(policy, steps, draw_noise(count, 3, 3, seed=0), **how)
    _, inverse = torch.cat([result.tokens, result.steps[:, None]], 1).unique(dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), count).scatter_reduce(0, inverse, torch.arange(count), "amin")
    result = type(result)(*(None if field is None else field[first] for field in result))
    return result, result.log_probs.sum(1).exp() / 3


def test_speed_has_no_expected_gradient_where_steps_are_drawn():
    network = Network(3)
    result, probability = every_outcome(network)
    assert len(probability) == 3 * 8 and probability.sum().item() == pytest.approx(1, abs=1e-5)
    count = len(probability)
    part = rows(result, torch.arange(3) < result.steps[:, None], mask_id=MASK)
    prompts = Prompts(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 5))
    one = take(prompts, torch.tensor([0]))
    loss, _ = micro_batch_loss(
        network, None, result, part, take(prompts, part.sample), repeat(one, len(part.sample)),
        speed_reward(result.steps, max_steps=3)[:, None].expand(-1, 3), probability[:, None].expand(-1, 3),
        grid=(1, 3), guidance=1.0, reference_guidance=1.0, order="halton", likelihood="token", clip_range=0.2,
        kl="none", kl_weight=0.0,
    )  # fmt: skip
    loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in network.parameters())


def test_where_the_policy_decides_the_gradient_is_that_of_the_expected_reward():
    """Against the score function summed over every way to stop, with any baseline, and against finite differences."""
    random = torch.Generator().manual_seed(3)
    pace, known, quality = disturbed(5, 7), torch.randn(4, 2, 5, generator=random), torch.rand(4, 3, generator=random)
    speed = speed_reward(torch.tensor([3, 5, 7]), max_steps=7)
    rewards = combine(quality, speed.expand(4, 3), steps_reward=0.4)
    pace_gradient(pace, known, rewards, size=4)
    found = {name: -p.grad.clone() for name, p in pace.named_parameters()}
    assert found["out.bias"].abs().min() > 1e-3 and found["out.weight"].abs().max() > 1e-3
    pace.zero_grad()
    for way in range(3):
        score = stop_log_probs(pace(known))[:, way]
        ((rewards[:, way] - 0.7) * score.detach().exp() * score).mean().backward()
    for name, p in pace.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    with torch.no_grad():
        pace.double()
        for (name, value), place in itertools.product(pace.named_parameters(), (0, 1)):
            moved = []
            for move in (1e-4, -2e-4):
                value.view(-1)[place] += move
                directions = torch.layer_norm(known.double(), (5,)) / 5**0.5
                on = ((directions * pace.out.weight).sum(-1) + pace.out.bias).sigmoid()
                ways = [1 - on[:, 0], on[:, 0] * (1 - on[:, 1]), on[:, 0] * on[:, 1]]
                moved.append(sum((way * rewards[:, i]).mean() for i, way in enumerate(ways)))
            value.view(-1)[place] += 1e-4
            exact = (moved[0] - moved[1]).item() / 2e-4
            assert found[name].flatten()[place].item() == pytest.approx(exact, rel=1e-2, abs=1e-5), (name, place)


def test_it_learns_to_go_on_where_that_pays():
    """Half of the pictures gain by a sweep, and their features say which, in noise: in 40 batches it is learned."""
    random = torch.Generator().manual_seed(0)
    pace, side = Pace(64, 4), torch.randn(64, generator=random)
    optimizer = torch.optim.AdamW(pace.parameters(), lr=0.2, weight_decay=0.0)

    def batch(count):
        gains = torch.rand(count, generator=random) < 0.5
        known = torch.randn(count, 64, generator=random) + torch.where(gains, 0.2, -0.2)[:, None] * side
        rewards = torch.stack([torch.zeros(count), torch.where(gains, 1.0, 0.0) - 0.4], 1)
        return known[:, None], rewards + torch.randn(count, 1, generator=random)

    for _ in range(40):
        optimizer.zero_grad()
        pace_gradient(pace, *batch(64), size=64)
        optimizer.step()
    known, rewards = batch(4000)
    on = pace(known)[:, 0] > 0
    gain = (rewards[:, 1] - rewards[:, 0]) * on
    assert gain.mean() > 0.2, "0.1 if all went on, 0.3 with perfect knowledge"
