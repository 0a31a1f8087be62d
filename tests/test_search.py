"""The search of the sampler's scalars: neutral at 1, a table for each octave, and a climb to what is rewarded."""

import pytest
import torch

from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, plan_steps, rollout
from speedrl.method.schedules import masked_counts
from speedrl.method.search import OCTAVES, SPREAD, Scalars, new_search, octave_weights, perturbed, scalars_at, updated

BEST = torch.tensor([0.3, -0.4, 0.2, 0.0])


def rising_logits(tokens, timestep, samples, positions):
    """A policy of 4x4 tokens and 7 codes, of which each is likelier than the one before it."""
    return torch.linspace(0, 1, 7).expand(*positions.shape, 7)


rising_logits.grid, rising_logits.mask_id = (4, 4), 7


def logs_of(scalars: Scalars) -> torch.Tensor:
    return torch.stack(list(scalars), 1).log()


def test_step_counts_between_octaves_weigh_both_neighbours():
    found = octave_weights(torch.tensor([1, 4, 6, 64, 256]))
    assert found.sum(1).tolist() == pytest.approx([1] * 5)
    assert found[1, 2] == 1 and found[3, 6] == found[4, 6] == 1 and found[0, 0] == 1
    assert found[2, 2] == pytest.approx(3 - torch.tensor(6.0).log2().item())


def test_without_a_table_and_with_one_of_zeros_all_scalars_are_one():
    steps = torch.tensor([1, 3, 8])
    for table in (None, torch.zeros(OCTAVES, len(SPREAD))):
        assert all(part.tolist() == [1, 1, 1] for part in scalars_at(table, steps))


def test_each_octave_has_scalars_of_its_own():
    table = torch.zeros(OCTAVES, 4)
    table[2], table[3] = torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    logs = logs_of(scalars_at(table, torch.tensor([2, 4, 8, 6])))
    share = torch.tensor(6.0).log2() - 2
    expected = torch.stack([torch.zeros(4), table[2], table[3], (1 - share) * table[2] + share * table[3]])
    torch.testing.assert_close(logs, expected)


def test_each_scalar_does_what_it_says():
    steps, one = torch.tensor([4, 4]), scalars_at(None, torch.tensor([4, 4]))
    late = masked_counts(steps, length=256, power=torch.tensor([1.0, 1.5]))
    assert (late[1, :3] > late[0, :3]).all() and (late[:, 3] == 0).all()
    rising = plan_steps(steps, Sampler(), length=256, scalars=one._replace(logit_scale_last=torch.tensor([4.0, 2.0])))
    assert rising.logit_scale.tolist() == [[1, 2, 3, 4], pytest.approx([1, 4 / 3, 5 / 3, 2])]
    first = scalars_at(None, torch.tensor([1]))._replace(logit_scale_first=torch.tensor([3.0]))
    assert plan_steps(torch.tensor([1]), Sampler(), length=256, scalars=first).logit_scale.tolist() == [[3]]

    noise, how = draw_noise(2, 4, 16, seed=0), Sampler(temperature=1.0)
    plain, same = rollout(rising_logits, steps, noise, how), rollout(rising_logits, steps, noise, how, scalars=one)
    assert torch.equal(plain.tokens, same.tokens) and torch.equal(plain.kept, same.kept)
    hot = rollout(rising_logits, steps, noise, how, scalars=one._replace(order_temperature=torch.tensor([1.0, 3.0])))
    assert torch.equal(hot.temperature[1], 3 * plain.temperature[1]) and torch.equal(hot.tokens[0], plain.tokens[0])
    sharp = one._replace(logit_scale_first=torch.full((2,), 50.0), logit_scale_last=torch.full((2,), 50.0))
    drawn = rollout(rising_logits, steps, noise, how, scalars=sharp).tokens
    assert (drawn == 6).all()  # the likeliest, with certainty


def test_a_samplers_own_table_is_what_its_rollouts_take():
    table = torch.randn(OCTAVES, 4, generator=torch.Generator().manual_seed(0)) / 4
    steps, noise = torch.tensor([4, 3]), draw_noise(2, 4, 16, seed=0)
    own = rollout(rising_logits, steps, noise, Sampler(scalars=table))
    given = rollout(rising_logits, steps, noise, Sampler(), scalars=scalars_at(table, steps))
    for name, value in vars(own).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(given, name)), name
    assert not torch.equal(own.logit_scale, rollout(rising_logits, steps, noise, Sampler()).logit_scale)


def test_candidates_are_drawn_around_the_table_and_are_the_same_again():
    steps, table = torch.full((4000,), 4), torch.zeros(OCTAVES, 4)
    table[2] = torch.tensor([0.3, -0.2, 0.1, 0.0])
    search = new_search(table)
    scalars, noise = perturbed(search, steps, seed=1, round=3)
    torch.testing.assert_close(logs_of(scalars).mean(0), table[2], atol=0.03, rtol=0)
    torch.testing.assert_close(logs_of(scalars).std(0), torch.tensor(SPREAD), atol=0.02, rtol=0)
    assert torch.equal(perturbed(search, steps, seed=1, round=3)[1], noise)
    assert not torch.equal(perturbed(search, steps, seed=1, round=4)[1], noise)


def test_the_search_raises_the_reward_and_other_step_counts_keep_their_scalars():
    search, steps, rewards = new_search(), torch.full((64,), 4), []
    for number in range(60):
        scalars, noise = perturbed(search, steps, seed=0, round=number)
        reward = -((logs_of(scalars) - BEST) ** 2).sum(1)
        rewards.append(-((search.table[2] - BEST) ** 2).sum().item())
        search = updated(search, steps, noise, reward - reward.mean(), rate=1.0)
    assert rewards[-1] > rewards[0] / 10 and rewards[0] < -0.2
    torch.testing.assert_close(search.table[2], BEST, atol=0.2, rtol=0)
    assert not search.table[[0, 1, 3, 4, 5, 6]].any() and search.seen.tolist() == [0, 0, 60, 0, 0, 0, 0]


def test_pairs_try_opposite_scalars_so_that_what_they_share_cancels():
    steps = torch.full((7,), 4)
    scalars, noise = perturbed(new_search(), steps, seed=3, round=1)
    assert torch.equal(noise[0:6:2], -noise[1:6:2]) and noise[6].any()
    torch.testing.assert_close(logs_of(scalars), noise * torch.tensor(SPREAD))
    shared = torch.randn(3, generator=torch.Generator().manual_seed(0)).repeat_interleave(2)
    found = updated(new_search(), steps[:6], noise[:6], shared)
    assert found.table.abs().max() < 1e-6


def test_an_octave_learns_from_its_own_samples_what_it_would_learn_alone():
    found = {}
    for name, counts, batches in (("alone", [4] * 32, 20), ("among", [1, 4, 16, 64] * 8, 80)):
        steps, tables = torch.tensor(counts).repeat_interleave(2), []
        for seed in range(8):
            search = new_search()
            for number in range(batches):
                scalars, noise = perturbed(search, steps, seed=seed, round=number)
                reward = -((logs_of(scalars) - BEST) ** 2).sum(1)
                # one step's rewards vary a hundredth as much, and it must not matter
                reward = torch.where(steps == 1, reward / 100, reward)
                for count in steps.unique():
                    reward[steps == count] -= reward[steps == count].mean()
                search = updated(search, steps, noise, reward, rate=1.0)
            tables.append(search.table)
        found[name] = torch.stack(tables)
        assert search.seen[2] == 20
    alone, among = found["alone"][:, 2], found["among"]
    torch.testing.assert_close(among[:, 2].mean(0), alone.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(among[:, 0].mean(0), alone.mean(0), atol=0.08, rtol=0)
    assert among[:, 2].std(0).mean() < 1.5 * alone.std(0).mean(), "its noise does not carry it off"


def test_advantages_of_zero_leave_the_table():
    search = new_search(torch.randn(OCTAVES, 4, generator=torch.Generator().manual_seed(0)))
    _, noise = perturbed(search, torch.tensor([3, 9]), seed=0, round=0)
    found = updated(search, torch.tensor([3, 9]), noise, torch.zeros(2))
    assert torch.equal(found.table, search.table) and found.seen.sum() == pytest.approx(1)
