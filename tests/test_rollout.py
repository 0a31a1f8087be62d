"""Rollouts: replay, schedule, noise, and the distribution that they sample."""

from collections import Counter

import pytest
import torch

from speedrl.method.likelihoods import log_probs
from speedrl.method.sampling import ORDERS, draw_noise, rollout, state, step
from speedrl.method.schedules import halton_order, masked_counts, timesteps

LENGTH, CODES = 6, 4
WEIGHTS = torch.randn(LENGTH * (CODES + 1), LENGTH * CODES, generator=torch.Generator().manual_seed(0))


def policy(tokens: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Logits that depend on every token and on the timestep, computed for each sample apart: [B, L, V]."""
    features = torch.nn.functional.one_hot(tokens, CODES + 1).flatten(1).float()
    logits = (features[:, :, None] * WEIGHTS).sum(1).view(-1, LENGTH, CODES)
    return logits * (1 + timestep[:, None, None] / 8)


def sample(steps: list[int], *, seed: int = 0, first: int = 0, **kwargs):
    steps = torch.tensor(steps)
    noise = draw_noise(len(steps), int(steps.max()), LENGTH, seed=seed, first=first)
    return rollout(policy, steps, noise, length=LENGTH, mask_id=CODES, grid=(2, 3), **kwargs)


@pytest.mark.parametrize("order", ORDERS)
def test_replayed_states_are_those_seen_while_sampling(order):
    seen = []

    def watched(tokens, timestep):
        seen.append((tokens.clone(), timestep.clone()))
        return policy(tokens, timestep)

    steps = torch.tensor([1, 2, 3, 6])
    result = rollout(
        watched, steps, draw_noise(4, 6, LENGTH, seed=1), length=LENGTH, mask_id=CODES, order=order, grid=(2, 3)
    )
    assert len(seen) == 6
    for s, (tokens, timestep) in enumerate(seen):
        assert torch.equal(state(result, s, mask_id=CODES), tokens)
        assert torch.equal(timesteps(steps)[:, s], timestep)
    per_sample = torch.tensor([0, 1, 2, 5])
    expected = torch.stack([seen[s][0][i] for i, s in enumerate(per_sample)])
    assert torch.equal(state(result, per_sample, mask_id=CODES), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_reveals_follow_the_schedule_and_cover_every_token_once(order):
    steps = torch.tensor([1, 2, 3, 4, 6])
    result = sample(steps.tolist(), order=order)
    masked = torch.stack([(state(result, s + 1, mask_id=CODES) == CODES).sum(1) for s in range(6)], 1)
    assert torch.equal(masked, masked_counts(steps, length=LENGTH))
    assert (result.tokens < CODES).all() and (result.reveal_step < steps[:, None]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_scoring_the_replayed_states_gives_ratio_one_exactly(order):
    steps = torch.tensor([1, 2, 3, 6])
    result = sample(steps.tolist(), order=order)
    scored = torch.zeros_like(result.log_probs)
    for s in range(6):
        logits = policy(state(result, s, mask_id=CODES), timesteps(steps)[:, s])
        scored = torch.where(result.reveal_step == s, log_probs(logits, result.tokens), scored)
    assert torch.equal(scored, result.log_probs)
    assert (scored < 0).all()


def test_a_sample_does_not_depend_on_its_batch():
    steps = [6, 1, 3, 2]
    mixed = sample(steps)
    for i, n in enumerate(steps):
        alone = sample([n], first=i)
        assert torch.equal(alone.tokens[0], mixed.tokens[i])
        assert torch.equal(alone.reveal_step[0], mixed.reveal_step[i])
        assert torch.equal(alone.log_probs[0], mixed.log_probs[i])


def test_noise_belongs_to_seed_and_index():
    many, one = draw_noise(4, 3, 5, seed=7), draw_noise(1, 8, 5, seed=7, first=2)
    assert torch.equal(many.uniform[2], one.uniform[0, :3]) and torch.equal(many.gumbel[2], one.gumbel[0, :3])
    assert not torch.equal(many.uniform[2], many.uniform[1])
    assert not torch.equal(many.uniform, draw_noise(4, 3, 5, seed=8).uniform)
    assert (many.uniform >= 0).all() and (many.uniform < 1).all() and many.gumbel.isfinite().all()


def test_noise_has_its_distributions_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = draw_noise(8, 8, 1000, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert noise.uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert noise.gumbel.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.gumbel.var() == pytest.approx(1.645, abs=0.05)
    pairs = torch.stack([noise.uniform.flatten(), noise.gumbel.flatten()])
    assert abs(pairs.corrcoef()[0, 1]) < 0.02


def test_ties_reveal_exactly_the_scheduled_count():
    tokens = torch.full((2, LENGTH), CODES)
    flat = torch.zeros(2, LENGTH, CODES)
    done = step(
        flat,
        tokens,
        torch.tensor([4, 1]),
        torch.zeros(2),
        torch.full((2, LENGTH), 0.5),
        torch.zeros(2, LENGTH),
        mask_id=CODES,
    )
    assert done.revealed.sum(1).tolist() == [2, 5]


def test_revealed_tokens_never_change_and_confidence_order_reveals_the_likeliest():
    tokens = torch.tensor([[CODES, 1, CODES, CODES, 2, CODES]])
    logits = policy(tokens, torch.tensor([1]))
    uniform, gumbel = torch.rand(2, 1, LENGTH, generator=torch.Generator().manual_seed(3))
    done = step(logits, tokens, torch.tensor([2]), torch.zeros(1), uniform, gumbel, mask_id=CODES)
    assert done.tokens[0, 1] == 1 and done.tokens[0, 4] == 2 and not done.revealed[0, [1, 4]].any()
    masked = tokens == CODES
    kept_back = masked & ~done.revealed
    assert done.log_probs[done.revealed].min() >= done.log_probs[kept_back].max()
    random = step(logits, tokens, torch.tensor([2]), torch.ones(1), uniform, gumbel, mask_id=CODES, order="random")
    assert gumbel[random.revealed].min() >= gumbel[masked & ~random.revealed].max()


def test_halton_order_reveals_the_same_positions_for_every_sample_and_seed():
    turns = halton_order(2, 3)
    for seed in (0, 1):
        result = sample([3] * 5, seed=seed, order="halton")
        left = masked_counts(torch.tensor([3]), length=LENGTH)[0]
        expected = torch.stack([turns >= LENGTH - count for count in left]).sum(0)
        assert torch.equal(result.reveal_step, expected.expand(5, -1))


def test_one_step_is_one_plain_sample():
    count = 4000
    noise = draw_noise(count, 1, LENGTH, seed=0)
    result = rollout(policy, torch.ones(count, dtype=torch.int64), noise, length=LENGTH, mask_id=CODES)
    expected = policy(torch.full((1, LENGTH), CODES), torch.tensor([0])).softmax(-1)[0]
    frequency = torch.nn.functional.one_hot(result.tokens, CODES).float().mean(0)
    assert (result.reveal_step == 0).all()
    torch.testing.assert_close(frequency, expected, atol=4 * 0.5 / count**0.5, rtol=0)


def test_more_steps_than_tokens_still_finishes():
    result = sample([10])
    assert (result.tokens < CODES).all() and result.reveal_step.max() == 9


def test_step_is_captured_whole_by_the_compiler():
    compiled = torch.compile(step, fullgraph=True, backend="eager")  # a host synchronisation would break the graph
    plain, captured = sample([3, 2], record=True), sample([3, 2], record=True, step=compiled)
    for a, b in zip(plain, captured, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_record_adds_draws_that_agree_with_the_result():
    result = sample([1, 3], record=True)
    assert result.drawn.shape == result.rank.shape == (2, 3, LENGTH)
    assert result.exact.shape == result.terms.shape == (2, 3)
    at_reveal = result.drawn.gather(1, result.reveal_step[:, None]).squeeze(1)
    assert torch.equal(at_reveal, result.tokens)
    settled = result.reveal_step[:, None] <= torch.arange(3)[:, None]
    assert torch.equal(result.drawn[settled], result.tokens[:, None].expand(-1, 3, -1)[settled])
    assert (result.rank.sort(-1).values == torch.arange(LENGTH)).all()
    assert (result.terms[0] > 0).tolist() == [True, False, False] and (result.exact[0, 1:] == 0).all()
    assert sample([1, 3]).drawn is None


def test_temperature_and_schedule_change_the_outcome():
    base = sample([3] * 8)
    assert Counter(base.reveal_step.flatten().tolist()) != Counter(
        sample([3] * 8, schedule="linear").reveal_step.flatten().tolist()
    )
    assert not torch.equal(base.reveal_step, sample([3] * 8, temperature=0.0).reveal_step)


def test_inference_mode_gives_the_same():
    with torch.inference_mode():
        inside = sample([2, 4])
    assert torch.equal(inside.tokens, sample([2, 4]).tokens)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'best'"):
        sample([2], order="best")
    with pytest.raises(ValueError, match="grid of 6 tokens"):
        rollout(policy, torch.tensor([1]), draw_noise(1, 1, 6, seed=0), length=6, mask_id=4, order="halton")
    with pytest.raises(ValueError, match="noise of shape"):
        rollout(policy, torch.tensor([3]), draw_noise(1, 2, LENGTH, seed=0), length=LENGTH, mask_id=CODES)
    with pytest.raises(ValueError, match="mask token"):
        rollout(policy, torch.tensor([1]), draw_noise(1, 1, LENGTH, seed=0), length=LENGTH, mask_id=CODES - 1)
