"""Values of states and the credit of each step."""

import pytest
import torch

from speedrl.method.advantages import step_advantages
from speedrl.method.sampling import Rollout, draw_noise, rollout, state, step
from speedrl.value import above_group, features, guesses, step_credit, sums, values

MASK = 6


def policy(tokens, timestep, samples=None, places=None):
    """Logits [B, 8, 6] that depend on the state, of some samples at some places."""
    table = torch.randn(7, 8, 6, generator=torch.Generator().manual_seed(3))
    logits = table[tokens].sum(1) / 3 + table[0] * (1 + timestep[:, None, None])
    return logits if places is None else logits.gather(1, places[..., None].expand(-1, -1, 6))


def finished(counts=(4, 2, 4, 1), **options) -> Rollout:
    counts = torch.tensor(counts)
    return rollout(policy, counts, draw_noise(len(counts), 4, 8, seed=1), length=8, mask_id=MASK, **options)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 1.0])
def test_step_advantages_are_those_of_a_plain_loop(gae_lambda):
    random = torch.Generator().manual_seed(0)
    known, returns, steps = torch.randn(5, 4, generator=random), torch.randn(5, generator=random), [4, 1, 3, 2, 4]
    found = step_advantages(known, returns, torch.tensor(steps), gae_lambda=gae_lambda)
    for b, count in enumerate(steps):
        ahead = [*known[b, :count].tolist(), returns[b].item()]
        for s in range(4):
            expected = sum(gae_lambda ** (k - s) * (ahead[k + 1] - ahead[k]) for k in range(s, count))
            assert found[b, s].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_guess_is_the_state_with_its_likeliest_tokens(sparse):
    done = finished(guess=True, sparse=sparse)
    assert done.guess.shape == (4, 4, 8)
    for s in range(4):
        seen = state(done, s, mask_id=MASK)
        likely = policy(seen, done.countdown[:, s]).argmax(-1)
        assert torch.equal(done.guess[:, s], torch.where(seen == MASK, likely, seen))
    assert finished(sparse=sparse).guess is None


def test_guesses_are_scored_where_a_sample_still_runs_beside_its_own_prompt():
    done, asked = finished(guess=True), []

    def score(tokens, texts):
        asked.append(texts)
        return tokens.double().mean(-1)

    found = guesses(done, ["a", "b", "c", "d"], score)
    assert asked == [["a", "b", "c"][:: 1 if s == 1 else 2] for s in (1, 2, 3)]
    assert found.dtype == torch.float32 and (found[:, 0] == 0).all() and (found[3] == 0).all()
    torch.testing.assert_close(found[0, 1:], done.guess[0, 1:].float().mean(-1))


def test_a_group_is_compared_among_those_that_take_the_step():
    exists = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    found = above_group(torch.tensor([[1.0, 5.0], [3.0, 9.0], [2.0, 1.0], [6.0, 3.0]]), exists, group_size=2)
    assert found.tolist() == [[-1.0, 0.0], [1.0, 0.0], [-2.0, -1.0], [2.0, 1.0]]


def test_values_are_the_least_squares_fit_and_nothing_where_nothing_was_seen():
    random = torch.Generator().manual_seed(0)
    done = finished(counts=[4] * 8)
    known = features(done, torch.randn(8, 4, generator=random), group_size=4)
    returns = torch.randn(8, generator=random)
    fit = sums(known[:3], returns[:3]) + sums(known[3:], returns[3:])  # of two ranks
    wanted = torch.linalg.lstsq(known.flatten(0, 1).double(), returns.double().repeat_interleave(4)).solution
    torch.testing.assert_close(values(known, fit).double(), known.double() @ wanted, atol=1e-5, rtol=1e-4)
    assert (values(known, torch.zeros(3, 4, dtype=torch.float64)) == 0).all()


def test_a_guess_that_tells_the_end_leaves_the_last_step_nothing_and_the_first_all():
    done, quality = finished(counts=[4] * 8), torch.randn(8, generator=torch.Generator().manual_seed(0))
    told = quality[:, None].repeat(1, 4)
    told[:, 0] = 0
    found, _ = step_credit(
        done, told, quality, quality, torch.zeros(3, 4, dtype=torch.float64), mine=slice(0, 8), group_size=4,
        gae_lambda=0.0, steps_reward=0.0, max_steps=4,
    )  # fmt: skip
    apart = (quality.view(2, 4) - quality.view(2, 4).mean(1, keepdim=True)).flatten()
    scale = apart.square().mean().sqrt()
    torch.testing.assert_close(found[:, 0], apart / scale, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[:, 1:], torch.zeros(8, 3), atol=1e-3, rtol=0)


def test_speed_is_credited_to_the_step_that_changed_the_plan():
    done = finished(counts=[4] * 4)
    countdown = torch.tensor([[3, 2, 1, 0], [3, 2, 0, 0], [3, 2, 1, 0], [3, 2, 1, 0]])
    done = done._replace(countdown=countdown, steps=torch.tensor([4, 3, 4, 4]))
    rewards = 0.5 * (1 - done.steps / 4)
    found, _ = step_credit(
        done, torch.zeros(4, 4), rewards, torch.zeros(4), torch.zeros(3, 4, dtype=torch.float64), mine=slice(0, 4),
        group_size=4, gae_lambda=0.0, steps_reward=0.5, max_steps=4,
    )  # fmt: skip
    assert found[1].argmax() == 1 and found[1, 1] > 1  # after it the plan was a step shorter
    torch.testing.assert_close(found[:, 0], torch.zeros(4))


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_revealed_tokens_have_a_gradient_on_average_only_where_the_likeliest_are_revealed(order):
    """Why a rollout's advantage, which goes with the state, biases a step's gradient, and one above its value not."""
    count, random = 40_000, torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 5, generator=random).expand(count, -1, -1)
    noise = draw_noise(1, count, 6, seed=2)
    done = step(
        logits, torch.full((count, 6), 5), torch.full((count,), 4), torch.full((count,), 0.5), noise.uniform[0],
        noise.gumbel[0], mask_id=5, order=order,
    )  # fmt: skip
    drawn = torch.nn.functional.one_hot(done.drawn, 5) - logits.softmax(-1)  # d log p / d logits
    mean = (drawn * done.revealed[..., None]).mean(0)  # [6, 5]
    sharper = (mean * logits[0].log_softmax(-1)).sum()  # along it, likely tokens gain
    noise_of_mean = (drawn * done.revealed[..., None]).std(0) / count**0.5
    if order == "random":
        assert (mean.abs() < 5 * noise_of_mean).all()
    else:
        assert sharper > 0.1 and (mean.abs() > 20 * noise_of_mean).any()
