"""The sampler's scalars: neutral at 1, replayed by training, and learned towards what is rewarded."""

import pytest
import torch

from speedrl.generation import generate
from speedrl.method.sampling import draw_noise, rollout
from speedrl.method.schedules import masked_counts
from speedrl.method.search import OCTAVES, SPREAD, Tuning, explored, improved, settled, shares, sharpness, untuned


def test_step_counts_between_octaves_have_shares_of_both_neighbours():
    found = shares(torch.tensor([1, 4, 6, 64, 256]))
    assert found.sum(1).tolist() == pytest.approx([1] * 5)
    assert found[1, 2] == 1 and found[3, 6] == found[4, 6] == 1 and found[0, 0] == 1
    assert found[2, 2] == pytest.approx(3 - torch.tensor(6.0).log2().item())


def test_a_table_of_zeros_is_the_hand_set_sampler(tiny_generator):
    tuned = tiny_generator._replace(tuning=torch.zeros(OCTAVES, len(SPREAD)))
    for steps in (1, 3, 8):
        assert torch.equal(generate(tiny_generator, ["a"], steps=steps), generate(tuned, ["a"], steps=steps))


def test_each_scalar_does_what_it_says():
    steps = torch.tensor([4, 4])
    one = untuned(2)
    late = masked_counts(steps, length=256, warp=torch.tensor([1.0, 1.5]))
    assert (late[1, :3] > late[0, :3]).all() and (late[:, 3] == 0).all()
    assert torch.equal(masked_counts(steps, length=256, warp=one.warp), masked_counts(steps, length=256))
    rising = sharpness(one._replace(last=torch.tensor([4.0, 2.0])), steps)
    assert rising.tolist() == [[1, 2, 3, 4], pytest.approx([1, 4 / 3, 5 / 3, 2])]
    assert sharpness(untuned(1)._replace(first=torch.tensor([3.0])), torch.tensor([1])).tolist() == [[3]]

    def policy(tokens, timestep):
        return torch.linspace(0, 1, 7).expand(len(tokens), 16, 7)

    noise = draw_noise(2, 4, 16, seed=0)
    how = {"length": 16, "mask_id": 7, "temperature": 1.0}
    plain = rollout(policy, steps, noise, **how)
    same = rollout(policy, steps, noise, **how, tuning=one)
    assert torch.equal(plain.tokens, same.tokens) and torch.equal(plain.reveal_step, same.reveal_step)
    hot = rollout(policy, steps, noise, **how, tuning=one._replace(heat=torch.tensor([1.0, 3.0])))
    assert torch.equal(hot.temperature[1], 3 * plain.temperature[1]) and torch.equal(hot.tokens[0], plain.tokens[0])
    sharp = rollout(
        policy, steps, noise, **how, tuning=one._replace(first=torch.full((2,), 50.0), last=torch.full((2,), 50.0))
    )
    assert (sharp.tokens == 6).all()  # the likeliest, with certainty


def test_trials_are_drawn_around_the_table_and_are_the_same_again():
    table, steps = torch.zeros(OCTAVES, 4), torch.full((4000,), 4)
    table[2] = torch.tensor([0.3, -0.2, 0.1, 0.0])
    tuning, noise = explored(table, steps, seed=1, iteration=3)
    logs = torch.stack(list(tuning), 1).log()
    torch.testing.assert_close(logs.mean(0), table[2], atol=0.03, rtol=0)
    torch.testing.assert_close(logs.std(0), torch.tensor(SPREAD), atol=0.02, rtol=0)
    assert torch.equal(explored(table, steps, seed=1, iteration=3)[1], noise)
    assert not torch.equal(explored(table, steps, seed=1, iteration=4)[1], noise)


def test_the_table_climbs_to_the_scalars_that_are_rewarded_and_other_step_counts_keep_theirs():
    table, seen = torch.zeros(OCTAVES, 4), torch.zeros(OCTAVES)
    steps, best = torch.full((64,), 4), torch.tensor([0.3, -0.4, 0.2, 0.0])
    for iteration in range(60):
        tuning, noise = explored(table, steps, seed=0, iteration=iteration)
        logs = torch.stack(list(tuning), 1).log()
        reward = -((logs - best) ** 2).sum(1)
        table, seen = improved(table, seen, steps, noise, reward - reward.mean(), rate=1.0)
    torch.testing.assert_close(settled(table, torch.tensor([4])).warp.log(), best[:1], atol=0.1, rtol=0)
    torch.testing.assert_close(table[2], best, atol=0.2, rtol=0)
    assert not table[[0, 1, 3, 4, 5, 6]].any() and seen.tolist() == [0, 0, 60, 0, 0, 0, 0]


def test_an_octave_with_a_part_of_the_samples_learns_in_as_many_of_its_own_what_it_would_alone():
    best = torch.tensor([0.3, -0.4, 0.2, 0.0])
    found = {}
    for name, steps, batches in (("alone", [4] * 64, 30), ("among", [1, 4, 16, 64] * 16, 120)):
        steps, tables = torch.tensor(steps), []
        for seed in range(20):
            table, seen = torch.zeros(OCTAVES, 4), torch.zeros(OCTAVES)
            for iteration in range(batches):
                tuning, noise = explored(table, steps, seed=seed, iteration=iteration)
                reward = -((torch.stack(list(tuning), 1).log() - best) ** 2).sum(1)
                # one step's rewards vary a hundredth as much, and it must not matter
                reward = torch.where(steps == 1, reward / 100, reward)
                of_count = reward.view(-1, len(steps.unique()))
                above = (of_count - of_count.mean(0)).flatten()
                table, seen = improved(table, seen, steps, noise, above, rate=1.0)
            tables.append(table)
        found[name] = torch.stack(tables)
        assert seen[2] == 30
    alone, among = found["alone"][:, 2], found["among"]
    torch.testing.assert_close(among[:, 2].mean(0), alone.mean(0), atol=0.04, rtol=0)
    torch.testing.assert_close(among[:, 0].mean(0), alone.mean(0), atol=0.04, rtol=0)
    assert among[:, 2].std(0).mean() < 1.5 * alone.std(0).mean(), "its noise does not carry it off"


def test_advantages_of_zero_leave_the_table():
    table = torch.randn(OCTAVES, 4, generator=torch.Generator().manual_seed(0))
    _, noise = explored(table, torch.tensor([3, 9]), seed=0, iteration=0)
    found, seen = improved(table, torch.zeros(OCTAVES), torch.tensor([3, 9]), noise, torch.zeros(2), rate=1.0)
    assert torch.equal(found, table) and seen.sum() == pytest.approx(1)
    assert isinstance(settled(table, torch.tensor([5])), Tuning)
