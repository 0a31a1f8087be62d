"""Rollouts: what a trajectory records, its schedule and its noise, and the sampler's step."""

import dataclasses

import pytest
import torch

from speedrl.method.sampler import ORDERS, Sampler
from speedrl.method.sampling import Trajectory, draw_noise, plan_steps, rollout, step
from speedrl.method.schedules import halton_order, masked_counts
from speedrl.method.scoring import positions_of, token_log_probs, token_logits
from speedrl.method.search import Scalars
from tests.toys import Toy, sampled

GRID, LENGTH, CODES = (2, 4), 8, 4
TOY = Toy(LENGTH, CODES, grid=GRID)
MIXED = [1, 2, 4, 8]  # the last one remasks in its last two steps
SCALARS = Scalars(*(torch.tensor(x) for x in ([1.0, 1.5, 0.8, 1.2], [1.0, 0.5, 2.0, 1.0], [1.0, 2.0, 0.7, 1.3],
                                              [1.0, 1.5, 2.0, 0.9])))


PARTS = [field.name for field in dataclasses.fields(Trajectory) if field.name not in ("order", "mask_id", "codes")]


def sample(steps: list[int] = MIXED, **how):
    return sampled(TOY, steps, **how)


@pytest.mark.parametrize("remask", [0.0, 0.5])
@pytest.mark.parametrize("order", ORDERS)
def test_recorded_states_and_timesteps_are_those_that_the_policy_saw(order, remask):
    seen = []

    class Watched(Toy):
        def __call__(self, tokens, timestep, samples, positions):
            seen.append((tokens.clone(), timestep.clone(), samples.clone(), positions.clone()))
            return super().__call__(tokens, timestep, samples, positions)

    noise, policy = draw_noise(4, 8, LENGTH, seed=1), Watched(LENGTH, CODES, grid=GRID)
    result = rollout(policy, torch.tensor(MIXED), noise, Sampler(order=order, remask=remask))
    assert len(seen) == 8
    for s, (tokens, timestep, samples, positions) in enumerate(seen):
        assert torch.equal(result.states[samples, s], tokens)
        assert torch.equal(result.timestep[samples, s], timestep)
        asked = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, positions, True)
        assert (asked | (tokens != CODES)).all(), "the head runs wherever something is masked"
        finished = torch.tensor(sorted(set(range(4)) - set(samples.tolist())), dtype=torch.int64)
        assert torch.equal(result.states[finished, s], result.tokens[finished])
    assert [len(tokens) for tokens, *_ in seen] == [4, 3, 2, 2, 2, 2, 2, 2]  # two at least


@pytest.mark.parametrize("remask", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_masked_counts_follow_the_plan_and_every_token_is_set(order, remask):
    result = sample(order=order, remask=remask)
    plan = plan_steps(torch.tensor(MIXED), Sampler(remask=remask), length=LENGTH)
    masked = result.states == CODES
    assert torch.equal(masked, result.masked)
    assert torch.equal(masked.sum(-1), plan.masked_before)
    after = torch.where(result.kept, result.drawn, result.states)
    assert torch.equal((after == CODES).sum(-1), plan.masked_after)
    assert not (result.kept & ~masked).any() and (result.tokens < CODES).all()
    assert torch.equal(result.states[:, 1:][plan.remasked[:, 1:] == 0], after[:, :-1][plan.remasked[:, 1:] == 0])
    assert torch.equal(after[:, -1], result.tokens)
    if not remask:
        assert (result.kept.sum(1) == 1).all(), "each position is set once"
        assert torch.equal(plan.masked_after, masked_counts(torch.tensor(MIXED), length=LENGTH))


@pytest.mark.parametrize("scalars", [None, SCALARS], ids=["plain", "scalars"])
@pytest.mark.parametrize("order", ORDERS)
def test_scoring_the_recorded_states_gives_ratio_one_exactly(order, scalars):
    result = sample(order=order, scalars=scalars, remask=0.5)
    scored = token_log_probs(TOY, result)
    assert torch.equal(scored, result.log_probs)
    drawn = result.states == CODES
    assert (scored[drawn] < 0).all() and (scored[~drawn] == 0).all()
    if scalars is not None:
        assert not torch.equal(token_log_probs(TOY, sample(remask=0.5)), scored)


@pytest.mark.parametrize("scalars", [None, SCALARS], ids=["plain", "scalars"])
def test_the_logits_at_chosen_positions_are_those_that_drew_their_tokens(scalars):
    result = sample(scalars=scalars, remask=0.5)
    for at in (positions_of(result), positions_of(result, all_drawn=True)):
        logits = token_logits(TOY, result, at)
        assert logits.shape == (len(at.position), CODES) and logits.dtype == torch.float32
        found = logits.log_softmax(-1).gather(1, result.drawn[at.place][:, None]).squeeze(1)
        torch.testing.assert_close(found, result.log_probs[at.place])


def test_a_sample_does_not_depend_on_its_batch():
    mixed = sample(remask=0.5)
    for i, n in enumerate(MIXED):
        alone = sample([n], first=i, remask=0.5)
        assert torch.equal(alone.tokens[0], mixed.tokens[i])
        for name in ("states", "drawn", "kept", "log_probs"):
            assert torch.equal(getattr(alone, name)[0], getattr(mixed, name)[i, :n])


def test_indexing_selects_samples():
    result = sample(remask=0.5)
    for index in (torch.tensor([3, 1]), slice(1, 3), torch.tensor([True, False, False, True])):
        part = result[index]
        assert len(part) == 2
        for name in PARTS:
            assert torch.equal(getattr(part, name), getattr(result, name)[index])
        assert (part.order, part.mask_id) == (result.order, result.mask_id) == ("confidence", CODES)


def test_noise_belongs_to_seed_and_index_or_name():
    many, one = draw_noise(4, 3, 5, seed=7), draw_noise(1, 8, 5, seed=7, first=2)
    assert torch.equal(many.uniform[2], one.uniform[0, :3]) and torch.equal(many.gumbel[2], one.gumbel[0, :3])
    assert not torch.equal(many.uniform[2], many.uniform[1])
    assert not torch.equal(many.uniform, draw_noise(4, 3, 5, seed=8).uniform)
    assert (many.uniform >= 0).all() and (many.uniform < 1).all() and many.gumbel.isfinite().all()
    named = draw_noise(2, 3, 5, seed=7, names=["a", "b"])
    assert torch.equal(named.uniform[1], draw_noise(1, 3, 5, seed=7, names=["b"]).uniform[0])


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
    tokens, flat = torch.full((2, LENGTH), CODES), torch.zeros(2, LENGTH, CODES)
    half, none = torch.full((2, LENGTH), 0.5), torch.zeros(2, LENGTH)
    done = step(flat, tokens, torch.tensor([6, 1]), torch.zeros(2), half, none, mask_id=CODES)
    assert done.kept.sum(1).tolist() == [2, 7]


def test_known_tokens_stay_and_confidence_order_reveals_the_likeliest():
    tokens = torch.tensor([[CODES, 1, CODES, CODES, 2, CODES, 0, CODES]])
    logits = TOY(tokens, torch.tensor([1]), torch.tensor([0]), torch.arange(LENGTH)[None])
    uniform, gumbel = torch.rand(2, 1, LENGTH, generator=torch.Generator().manual_seed(3))
    done = step(logits, tokens, torch.tensor([2]), torch.zeros(1), uniform, gumbel, mask_id=CODES)
    masked = tokens == CODES
    assert torch.equal(done.tokens[~masked], tokens[~masked]) and not done.kept[~masked].any()
    assert done.log_probs[done.kept].min() >= done.log_probs[masked & ~done.kept].max()
    random = step(logits, tokens, torch.tensor([2]), torch.ones(1), uniform, gumbel, mask_id=CODES, order="random")
    assert gumbel[random.kept].min() >= gumbel[masked & ~random.kept].max()


def test_halton_order_reveals_the_same_positions_for_every_sample_and_seed():
    turns, left = halton_order(*GRID), masked_counts(torch.tensor([3]), length=LENGTH)[0]
    for seed in (0, 1):
        masked = sample([3] * 5, seed=seed, order="halton").states == CODES
        for s in (1, 2):
            assert torch.equal(masked[:, s], (turns >= LENGTH - left[s - 1]).expand(5, -1))


def test_one_step_is_one_plain_sample():
    count = 4000
    result = sample([1] * count)
    every = torch.arange(LENGTH)[None]
    expected = TOY(torch.full((1, LENGTH), CODES), torch.tensor([0]), torch.tensor([0]), every).softmax(-1)[0]
    frequency = torch.nn.functional.one_hot(result.tokens, CODES).float().mean(0)
    torch.testing.assert_close(frequency, expected, atol=4 * 0.5 / count**0.5, rtol=0)


def test_more_steps_than_tokens_still_finish():
    result = sample([11], remask=0.5)
    assert (result.tokens < CODES).all() and result.states.shape[1] == 11


def test_step_is_captured_whole_by_the_compiler():
    compiled = torch.compile(step, fullgraph=True, backend="eager")  # a host synchronisation would break the graph
    plain, captured = sample([3, 2]), sample([3, 2], step=compiled)
    for name in PARTS:
        assert torch.equal(getattr(plain, name), getattr(captured, name))


def test_temperature_and_schedule_change_the_outcome():
    base = sample([3] * 8)
    assert not torch.equal(base.kept.sum(-1), sample([3] * 8, schedule="linear").kept.sum(-1))
    assert not torch.equal(base.kept, sample([3] * 8, temperature=0.0).kept)


def test_inference_mode_gives_the_same():
    with torch.inference_mode():
        inside = sample([2, 4])
    assert torch.equal(inside.tokens, sample([2, 4]).tokens)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="noise of shape"):
        rollout(TOY, torch.tensor([3]), draw_noise(1, 2, LENGTH, seed=0), Sampler())
    wrong = Toy(LENGTH, CODES, grid=GRID)
    wrong.mask_id = CODES - 1
    with pytest.raises(ValueError, match="mask token"):
        rollout(wrong, torch.tensor([1]), draw_noise(1, 1, LENGTH, seed=0), Sampler())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"guidance": 0.5}, "`guidance` must be at least 1"), ({"guidance": float("nan")}, "`guidance`"),
     ({"guidance": float("inf")}, "`guidance`"), ({"schedule": "cubic"}, "`schedule` must be cosine"),
     ({"schedule": "power:-1"}, "`schedule` power:X takes a positive number"), ({"order": "best"}, "`order` must be"),
     ({"temperature": -1.0}, "`temperature` must be finite and not negative"), ({"temperature": float("inf")},
     "`temperature`"), ({"remask": -0.1}, "`remask` is a share"), ({"remask": 1.1}, "`remask` is a share"),
     ({"remask": float("nan")}, "`remask` is a share")],
)
def test_a_sampler_refuses_what_is_out_of_range_also_when_it_is_replaced(wrong, says):
    for make in (Sampler, Sampler().replace):
        with pytest.raises(ValueError, match=says):
            make(**wrong)


def test_replacing_nothing_leaves_a_sampler_as_it_is_and_evaluations_count_guidance_twice():
    sampler = Sampler(guidance=3.0, order="halton", scalars=torch.ones(7, 4))
    same = sampler.replace(guidance=None, order=None, scalars=None)
    assert same == sampler and same.scalars is sampler.scalars
    assert sampler.replace(order="random").order == "random" and sampler.order == "halton"
    assert sampler.evaluations(8) == 16 and Sampler().evaluations(8) == 8


def test_shared_noise_leaves_each_tokens_distribution_and_lets_alike_positions_agree():
    count, every = 4000, torch.arange(LENGTH)[None]
    result = sample([1] * count, shared_noise=True)
    expected = TOY(torch.full((1, LENGTH), CODES), torch.tensor([0]), torch.tensor([0]), every).softmax(-1)[0]
    frequency = torch.nn.functional.one_hot(result.tokens, CODES).float().mean(0)
    torch.testing.assert_close(frequency, expected, atol=4 * 0.5 / count**0.5, rtol=0)
    # of the same logits everywhere, all positions of a sample draw one token; samples differ
    codes, none = draw_noise(8, 1, LENGTH, seed=0, codes=CODES).codes[:, 0], torch.zeros(8, LENGTH)
    logits, masked = torch.randn(CODES).expand(8, LENGTH, CODES), torch.full((8, LENGTH), CODES)
    left = torch.zeros(8, dtype=torch.int64)
    done = step(logits, masked, left, torch.zeros(8), none, none, mask_id=CODES, codes=codes)
    assert (done.tokens == done.tokens[:, :1]).all() and len(done.tokens[:, 0].unique()) > 1
    alone = sample([1] * count)
    agree = [(x.tokens[:, :1] == x.tokens[:, 1:]).float().mean() for x in (result, alone)]
    assert agree[0] > agree[1] + 0.03


def test_shared_noise_is_that_of_the_sample_and_of_its_step():
    long, short = draw_noise(2, 5, 3, seed=0, codes=4), draw_noise(1, 2, 3, seed=0, first=1, codes=4)
    assert torch.equal(long.codes[1, :2], short.codes[0]) and not torch.equal(long.codes[0], long.codes[1])
    assert not torch.equal(long.codes[0, 0], long.codes[0, 1])
    assert torch.equal(long.uniform, draw_noise(2, 5, 3, seed=0).uniform), "the other noise stays"
    with pytest.raises(ValueError, match="`shared_noise`"):
        rollout(TOY, torch.tensor([2]), draw_noise(1, 2, LENGTH, seed=0), Sampler(shared_noise=True))
