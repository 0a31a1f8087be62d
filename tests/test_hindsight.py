"""The dense reward of the reference with hindsight: its gradient by enumeration, what is hidden, and its teacher."""

import itertools

import pytest
import torch

from speedrl.method.divergences import ce_kl
from speedrl.method.hindsight import hide, hindsight_weights, teacher_features
from speedrl.method.ratios import token_events
from speedrl.method.sampling import Trajectory
from speedrl.method.schedules import masked_counts, timesteps
from speedrl.method.scoring import positions_of
from speedrl.training import grpo_loss
from tests.toys import Toy, every_step, every_trajectory, log_likelihood, sampled

LENGTH, CODES = 3, 2
START, REFERENCE = Toy(LENGTH, CODES, seed=1), Toy(LENGTH, CODES, seed=5)


def term(policy: Toy, reference: Toy, trajectory: Trajectory, finished: torch.Tensor, trained=None, *, weight=1.0):
    """The hindsight term of `grpo_loss` alone, and its statistics."""
    zeros = torch.zeros(len(trajectory))
    trained = every_step(trajectory) if trained is None else trained
    return grpo_loss(policy, reference, trajectory, zeros, zeros, trained, likelihood=token_events, kl=ce_kl,
                     kl_weight=0.0, hindsight=weight, finished=finished)


def hidden_sets(tokens: torch.Tensor, count: int):
    """Finished samples with each set of so many positions hidden."""
    for places in itertools.combinations(range(tokens.shape[1]), count):
        yield tokens.index_fill(1, torch.tensor(places), CODES)


def closed_form(policy: Toy, reference: Toy, every: Trajectory, p: torch.Tensor, count: int) -> torch.Tensor:
    """Expected sum over tokens of KL(pi(. | state that drew it) || r(. | the finished sample with hidden tokens)), and
    where the state knows nothing, of KL(r(. | state) || pi(. | state)) at all positions: by plain loops over samples,
    hidden sets, steps and positions; in double precision."""
    total, sets = torch.zeros((), dtype=torch.float64), list(itertools.combinations(range(LENGTH), count))
    zero = torch.zeros(1, dtype=torch.int64)
    timestep = {1: 13, 2: 29, 3: 63}[count]  # of 64 cosine steps: cos(pi / 2 * (63 - t) / 64) is just above count / 3
    for i in range(len(every)):
        for places in sets:
            seen = every.tokens[i].clone()
            seen[list(places)] = CODES
            with torch.no_grad():
                teacher = reference.features(seen[None], torch.tensor([timestep]), zero)[0, 0].double().softmax(-1)
            for s in range(int(every.steps[i])):
                state = policy.features(every.states[i, s][None], every.timestep[i, s][None], zero)[0, 0].double()
                student = (state * every.logit_scale[i, s]).softmax(-1)
                if (every.states[i, s] == CODES).all():
                    with torch.no_grad():
                        given = (every.states[i, s][None], every.timestep[i, s][None], zero)
                        held = (reference.features(*given)[0, 0].double() * every.logit_scale[i, s]).softmax(-1)
                    total = total + p[i] * (held * (held / student).log()).sum() / len(sets)
                    continue
                for place in places:
                    if every.kept[i, s, place]:
                        q = teacher[place].clamp(min=torch.tensor(-12.0).exp().item())
                        away = (student[place] * (student[place] / q).log()).sum()
                        # a token is hidden in this share of the sets, and counts once in all of them
                        total = total + p[i] * away / len(sets) / (count / LENGTH)
    return total


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("steps", "how"), [(1, {}), (2, {"schedule": "linear"})])
def test_the_gradient_is_that_of_the_expected_divergence_over_all_trajectories_and_hidden_sets(steps, how, count):
    every = every_trajectory(START, steps, **how)
    p, policy = log_likelihood(START, every).exp(), START.moved(0.0)
    found, sets = torch.zeros_like(policy.weights), list(hidden_sets(every.tokens, count))
    value = 0.0
    for i in range(len(every)):
        for finished in sets:
            loss, stats = term(policy, REFERENCE, every[i : i + 1], finished[i : i + 1])
            value += (p[i] * loss / len(sets)).item()
            found += p[i] * torch.autograd.grad(loss, policy.weights)[0] / len(sets)
            assert stats["hindsight"] == loss
    true = closed_form(policy, REFERENCE, every, p, count)
    assert value == pytest.approx(true.item(), rel=1e-4) and value > 0.1
    (expected,) = torch.autograd.grad(true, policy.weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for index in [(2, 0), (5, 1)]:
            shift = torch.zeros_like(found)
            shift[index] = 0.01
            up, down = (closed_form(Toy(LENGTH, CODES, weights=policy.weights + by), REFERENCE, every, p, count)
                        for by in (shift, -shift))
            assert ((up - down) / 0.02).item() == pytest.approx(found[index].item(), abs=1e-4)
    assert found.abs().max() > 0.05


class Blind(Toy):
    """A policy that looks at nothing: the same distribution at every state."""

    def features(self, tokens, timestep, samples):
        return (self.weights[:LENGTH, :CODES].expand(len(tokens), -1, -1))[None]


def test_where_the_policy_says_what_the_teacher_says_there_is_nothing_to_learn():
    policy = Blind(LENGTH, CODES, weights=START.weights.clone().requires_grad_())
    trajectory = sampled(policy, [1, 2, 3])
    (finished, *_) = hidden_sets(trajectory.tokens, 2)
    loss, stats = term(policy, Blind(LENGTH, CODES, weights=START.weights), trajectory, finished)
    assert loss == stats["hindsight"] == 0
    assert torch.autograd.grad(loss, policy.weights)[0].abs().max() < 1e-6
    other = Blind(LENGTH, CODES, weights=REFERENCE.weights)
    loss, _ = term(policy, other, trajectory, finished)
    assert loss > 0.1 and torch.autograd.grad(loss, policy.weights)[0].abs().max() > 0.1


def test_descending_it_brings_the_policy_to_the_teacher():
    policy = Blind(LENGTH, CODES, weights=START.weights.clone().requires_grad_())
    teacher = Blind(LENGTH, CODES, weights=REFERENCE.weights)
    optimizer, random = torch.optim.Adam([policy.weights], lr=0.1), torch.Generator().manual_seed(0)
    for seed in range(60):
        trajectory = sampled(policy, [1, 2] * 4, seed=seed)
        finished = hide(trajectory.tokens, torch.rand(8, LENGTH, generator=random), share=0.7, mask_id=CODES)
        optimizer.zero_grad()
        (term(policy, teacher, trajectory, finished)[0] / (8 * LENGTH)).backward()
        optimizer.step()
    found, wanted = (each.weights[:LENGTH, :CODES].softmax(-1) for each in (policy, teacher))
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_training_on_some_steps_is_unbiased():
    policy, trajectory = START.moved(0.0), sampled(START, [1, 2, 3])
    (finished, *_) = hidden_sets(trajectory.tokens, 2)

    def gradient(trained=None) -> torch.Tensor:
        return torch.autograd.grad(term(policy, REFERENCE, trajectory, finished, trained)[0], policy.weights)[0]

    found = []
    for second, third in itertools.product(range(2), range(3)):
        trained = torch.zeros(3, 3, dtype=torch.bool)
        trained[0, 0] = trained[1, second] = trained[2, third] = True
        found.append(gradient(trained))
    torch.testing.assert_close(torch.stack(found).mean(0), gradient(), atol=1e-5, rtol=1e-4)
    assert (found[0] - gradient()).abs().max() > 1e-2, "one choice alone is not the mean"


def test_its_weight_scales_it_and_without_finished_samples_there_is_none():
    policy, trajectory = START.moved(0.0), sampled(START, [2])
    (finished, *_) = hidden_sets(trajectory.tokens, 2)
    once, twice = (term(policy, REFERENCE, trajectory, finished, weight=weight)[0].item() for weight in (1.0, 2.0))
    assert twice == pytest.approx(2 * once) and once > 0
    loss, stats = term(policy, REFERENCE, trajectory, None)
    assert loss == 0 and "hindsight" not in stats


@pytest.mark.parametrize(("share", "count"), [(0.75, 12), (0.5, 8), (1.0, 16), (0.01, 1), (0.1, 2)])
def test_exactly_the_share_is_hidden_of_every_sample_and_the_rest_stays(share, count):
    random = torch.Generator().manual_seed(0)
    tokens, uniform = torch.randint(9, (200, 16), generator=random), torch.rand(200, 16, generator=random)
    before = tokens.clone()
    found = hide(tokens, uniform, share=share, mask_id=9)
    hidden = found == 9
    assert (hidden.sum(1) == count).all() and torch.equal(found[~hidden], tokens[~hidden])
    assert torch.equal(tokens, before)
    if count < 16:
        assert (uniform.masked_fill(~hidden, -1).amax(1) < uniform.masked_fill(hidden, 2).amin(1)).all()
        assert hidden.any(0).all(), "each position has its turn"


def test_tokens_that_were_hidden_and_kept_count_and_all_where_nothing_is_known():
    trajectory = sampled(START, [1, 2, 3])
    finished = trajectory.tokens.clone()
    finished[0, 0] = finished[1, :2] = finished[2] = CODES  # one, two and three hidden
    at = positions_of(trajectory, all_drawn=True)
    weights = torch.zeros(trajectory.states.shape).index_put(at.place, hindsight_weights(trajectory, at, finished))
    first, later = weights[:, 0], weights[:, 1:]
    assert torch.equal(first, torch.ones(3, LENGTH)), "in the first step nothing is known"
    share = torch.tensor([1 / 3, 2 / 3, 1.0])[:, None, None]
    torch.testing.assert_close(later, trajectory.kept[:, 1:] * (finished == CODES)[:, None] / share)
    assert later.any()
    scored = positions_of(trajectory, all_unknown=True)
    found = torch.zeros(trajectory.states.shape, dtype=torch.bool).index_put(scored.place, torch.tensor(True))
    assert torch.equal(found, trajectory.kept | trajectory.masked.all(-1, keepdim=True))


class Noting(Toy):
    def features(self, tokens, timestep, samples):
        self.seen = (tokens, timestep, samples)
        return super().features(tokens, timestep, samples)


def test_the_teacher_has_no_gradient_and_sees_every_finished_sample_once():
    reference = Noting(LENGTH, CODES, weights=REFERENCE.weights.clone().requires_grad_())
    finished = torch.tensor([[0, CODES, CODES], [CODES, CODES, CODES]])
    found = teacher_features(reference, finished, mask_id=CODES)
    assert found.shape == (1, 2, LENGTH, CODES) and not found.requires_grad
    assert torch.equal(reference.seen[0], finished) and reference.seen[2].tolist() == [0, 1]
    policy, trajectory = START.moved(0.0), sampled(START, [1, 2])
    loss, _ = term(policy, reference, trajectory, finished)
    loss.backward()
    assert policy.weights.grad.any() and reference.weights.grad is None


def test_the_teacher_is_told_the_timestep_at_which_a_cosine_schedule_has_as_much_masked():
    reference = Noting(4096, 1)
    reference.features = lambda tokens, timestep, samples: timestep
    counts = [4096, *masked_counts(torch.tensor([64]), length=4096)[0, :-1].tolist()]  # what each of 64 steps sees
    finished = (torch.arange(4096) < torch.tensor(counts)[:, None]).long()  # of one code, 0; masked is 1
    assert torch.equal(teacher_features(reference, finished, mask_id=1), timesteps(torch.tensor([64]))[0])
