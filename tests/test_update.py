"""What one update computes of a trajectory, `grpo_loss`: its gradient by enumeration, its clipping, and its plain
twin."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speedrl.generation import make_policy
from speedrl.method.divergences import DIVERGENCES, ce_kl
from speedrl.method.hindsight import hide, teacher_features
from speedrl.method.likelihoods import step_log_prob
from speedrl.method.losses import policy_loss
from speedrl.method.ratios import LIKELIHOODS, last_draws, token_events
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, rollout, step
from speedrl.method.scoring import positions_of, score, score_logits, trained_steps
from speedrl.system.memory import MicroBatches
from speedrl.training import grpo_loss
from tests.toys import Toy, every_step, every_trajectory, joined, log_likelihood, sampled, scored

GRID, LENGTH, CODES = (2, 4), 8, 3
TOY = Toy(LENGTH, CODES, grid=GRID)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.7, 2.0])
ONES = torch.ones(4)


def loss_of(policy, trajectory, advantages, keep, trained=None, *, reference=None, likelihood="token", kl="ce", **how):
    """`grpo_loss` by the names of its likelihood and divergence; of all steps and without a divergence if not said."""
    trained = every_step(trajectory) if trained is None else trained
    return grpo_loss(policy, reference, trajectory, advantages, keep, trained, likelihood=LIKELIHOODS[likelihood],
                     kl=DIVERGENCES[kl], **{"kl_weight": 0.0} | how)


def gradient_of(policy: Toy, *given, **how) -> torch.Tensor:
    return torch.autograd.grad(loss_of(policy, *given, **how)[0], policy.weights)[0]


@pytest.mark.parametrize("remask", [0.0, 0.5])
@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_at_ratio_one_the_exact_gradient_weighs_each_sample_alike_whatever_its_step_count(order, remask):
    """The gradient is -sum_i A_i grad log pi(trajectory i): no sample counts by its number of terms."""
    policy = TOY.moved(0.0)
    trajectory = sampled(policy, [1, 2, 4, 8], order=order, remask=remask)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = gradient_of(policy, trajectory, ADVANTAGES, keep, likelihood="exact")
    true = -(ADVANTAGES * keep * log_likelihood(policy, trajectory, order=order)).sum()
    (expected,) = torch.autograd.grad(true, policy.weights)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("likelihood", ["token", "sequence"])
def test_at_ratio_one_the_surrogates_gradient_is_that_of_the_finished_tokens(likelihood):
    """Those that a remasking step drew again count for nothing."""
    policy = TOY.moved(0.0)
    trajectory = sampled(policy, [1, 2, 4, 8], remask=0.5)
    found = gradient_of(policy, trajectory, ADVANTAGES, ONES, likelihood=likelihood)
    at, token = scored(policy, trajectory, all_drawn=False)
    last = last_draws(trajectory)[at.place]
    assert not last.all()
    (expected,) = torch.autograd.grad(-(ADVANTAGES[at.place[0]] * token * last).sum(), policy.weights)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_on_policy_rounding_of_the_recorded_log_probabilities_does_not_clip(likelihood):
    """A rollout in bf16 records others than training computes in float32: by up to half a nat under guidance."""
    policy = TOY.moved(0.0)
    trajectory = sampled(policy, [1, 2, 4, 8])
    noise = torch.randn(trajectory.log_probs.shape, generator=torch.Generator().manual_seed(0))
    rounded = dataclasses.replace(trajectory, log_probs=trajectory.log_probs + 0.5 * noise * trajectory.masked)
    how = {"likelihood": likelihood}
    loss, stats = loss_of(policy, rounded, ADVANTAGES, ONES, **how)
    assert stats["ratio_max"] == 1 and stats["clipped"] == 0 and stats["approx_kl"] == 0, "the ratio is exactly 1"
    (found,) = torch.autograd.grad(loss, policy.weights)
    torch.testing.assert_close(found, gradient_of(policy, trajectory, ADVANTAGES, ONES, **how), atol=2e-5, rtol=1e-4)
    assert stats["mismatch"].item() == pytest.approx((0.5 * noise.abs() * trajectory.kept).sum().item(), rel=0.4)
    if likelihood != "exact":  # scored at the kept tokens
        assert stats["mismatch"].item() == pytest.approx((0.5 * noise.abs() * trajectory.kept).sum().item(), rel=1e-4)
    assert loss_of(policy, trajectory, ADVANTAGES, ONES, **how)[1]["mismatch"] < 1e-5
    off = loss_of(policy, rounded, ADVANTAGES, ONES, on_policy=False, **how)[1]
    assert off["clipped"] > 0 and off["ratio_max"] > 1.05, "with more updates the recorded ones are the old policy's"


def choices(trajectory, count: int):
    """Every choice of `count` steps of each sample that has more: bool [B, S], each as likely as another."""
    whole = every_step(trajectory)
    for chosen in itertools.product(*(itertools.combinations(range(n), min(count, n)) for n in trajectory.steps)):
        trained = torch.zeros_like(whole)
        for sample, picked in enumerate(chosen):
            trained[sample, list(picked)] = True
        yield trained


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("likelihood", "moved", "kl"),
    [("token", 0.3, "ce"), ("token", 0.3, "k3"), ("exact", 0.3, "ce"), ("exact", 0.0, "k2"), ("sequence", 0.0, "ce"),
     ("token", 0.0, "reverse")],
)
def test_training_on_some_steps_is_unbiased(likelihood, moved, kl, count):
    """The mean gradient over every choice of K of N steps is that of all steps.

    After an update as well for "token" and "exact", whose events lie within one step; for "sequence", whose ratio is
    the exponential of a mean over steps, at ratio 1 only.
    """
    policy = TOY.moved(moved)
    trajectory = sampled(TOY, [1, 2, 4])
    how = {"likelihood": likelihood, "kl": kl, "kl_weight": 3.0, "on_policy": not moved}
    given = (policy, trajectory, ADVANTAGES[:3], torch.tensor([1.0, 0.0, 1.0]))
    how["reference"] = TOY.moved(0.5, seed=3)
    whole = gradient_of(*given, **how)
    found = [gradient_of(*given, trained, **how) for trained in choices(trajectory, count)]
    torch.testing.assert_close(torch.stack(found).mean(0), whole, atol=1e-4, rtol=1e-4)
    assert (found[0] - whole).abs().max() > 1e-2, "one choice alone is not the mean"


def test_after_an_update_some_steps_are_a_biased_sample_of_a_sequence():
    policy, trajectory = TOY.moved(0.3), sampled(TOY, [4])
    given = (policy, trajectory, ONES[:1], ONES[:1])
    how = {"likelihood": "sequence", "clip_range": 100.0, "on_policy": False}
    whole = gradient_of(*given, **how)
    found = [gradient_of(*given, trained, **how) for trained in choices(trajectory, 1)]
    assert (torch.stack(found).mean(0) - whole).abs().max() > 1e-3


def test_every_choice_of_steps_is_as_likely():
    steps = torch.full((6000,), 4)
    which = trained_steps(steps, 2, torch.Generator().manual_seed(0))
    kinds, counts = which.unique(dim=0, return_counts=True)
    assert len(kinds) == 6 and (which.sum(-1) == 2).all()
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations
    few = trained_steps(torch.tensor([1, 2, 5]), 2, torch.Generator())
    assert few.sum(1).tolist() == [1, 2, 2] and not few[0, 1:].any() and not few[1, 2:].any()
    assert torch.equal(trained_steps(torch.tensor([1, 3]), None, torch.Generator()),
                       torch.tensor([[True, False, False], [True] * 3]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_after_an_update_clipped_events_have_no_gradient_and_others_do(likelihood):
    policy, steps = TOY.moved(1.0), [1, 2, 4, 8] * 4
    trajectory, advantages = sampled(TOY, steps), torch.linspace(-1, 1, 16)
    at, token = scored(policy, trajectory, all_drawn=likelihood == "exact")
    ratio, sample, tokens = LIKELIHOODS[likelihood](token, trajectory.log_probs[at.place], trajectory, at)
    loss, stats = policy_loss(ratio, advantages[sample], tokens)
    (gradient,) = torch.autograd.grad(loss, ratio, retain_graph=True)
    a, r = advantages[sample], ratio.exp()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    assert 0 < clipped.sum() < len(clipped) and not gradient[clipped].any()
    assert (gradient[~clipped & (tokens > 0)] != 0).all()
    assert 0 < stats["clipped"] < stats["weight"]
    given, how = (trajectory, advantages, torch.ones(16)), {"likelihood": likelihood, "on_policy": False}
    loss, stats = loss_of(policy, *given, **how)
    assert stats["clipped"] == tokens[clipped].sum() and stats["ratio_max"] > 1.05
    # only events that are not clipped reach the weights
    (found,) = torch.autograd.grad(loss, policy.weights)
    live = -(ratio.exp() * a * tokens)[~clipped].sum()
    torch.testing.assert_close(found, torch.autograd.grad(live, policy.weights)[0], atol=1e-4, rtol=1e-3)
    before = loss_of(TOY, *given, **how)[1]
    assert before["clipped"] == 0 and before["ratio_max"] == 1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kl", ["ce", "k3"])
def test_micro_batches_add_up_with_filtered_samples(likelihood, kl):
    trajectory = sampled(TOY, [1, 2, 4, 8], remask=0.5)
    keep, trained = torch.tensor([0.0, 1.0, 0.0, 1.0]), trained_steps(trajectory.steps, 2, torch.Generator())
    found = []
    for size in (1, 3, 4):
        policy, batches = TOY.moved(0.5), MicroBatches(size, undo=lambda: None)
        for index in batches.over(torch.arange(4)):
            with batches:
                loss, stats = loss_of(policy, trajectory[index], ADVANTAGES[index], keep[index], trained[index],
                                      reference=TOY, likelihood=likelihood, kl=kl, kl_weight=0.2, on_policy=False)
                (loss / (4 * LENGTH)).backward()
                batches.add(stats)
        found.append((policy.weights.grad, batches.totals))
    for gradient, totals in found[:2]:
        torch.testing.assert_close(gradient, found[2][0], atol=1e-6, rtol=1e-4)
        assert totals == pytest.approx(found[2][1], rel=1e-4, abs=1e-5)
    assert found[2][0].abs().max() > 1e-3 and found[2][1]["weight"] > 0 and found[2][1]["kl"] > 0


def test_nothing_kept_gives_no_gradient_and_an_advantage_that_is_not_finite_one_that_is_not():
    trajectory, policy = sampled(TOY, [2, 4]), TOY.moved(0.5)
    how = {"on_policy": False}
    assert not gradient_of(policy, trajectory, ONES[:2], torch.zeros(2), **how).any()
    infinite = torch.tensor([torch.inf, 1.0])
    assert not gradient_of(policy, trajectory, infinite, ONES[:2], **how).isfinite().all()


def test_the_divergence_is_that_of_all_samples_whatever_is_kept():
    """A sample without a peer of its step count has no policy loss: here the one of 8 steps, which holds nearly all the
    weight of the divergence."""
    policy, trajectory = TOY.moved(0.5), sampled(TOY, [1, 1, 1, 8])
    known = torch.tensor([1.0, 1.0, 1.0, 0.0])
    held = {}
    for name, keep in (("known", known), ("all", ONES), ("none", torch.zeros(4))):
        loss, stats = loss_of(policy, trajectory, torch.zeros(4), keep, reference=TOY, kl_weight=1.0)
        held[name] = (loss.item(), stats["kl"].item(), torch.autograd.grad(loss, policy.weights)[0])
    for loss, away, gradient in held.values():
        assert loss == pytest.approx(held["all"][0]) and away == pytest.approx(held["all"][1])
        torch.testing.assert_close(gradient, held["all"][2])
    part = trajectory[torch.tensor([0, 1, 2])]
    without, _ = loss_of(policy, part, torch.zeros(3), ONES[:3], reference=TOY, kl_weight=1.0)
    assert held["known"][0] > 10 * without.item(), "the sample of 8 steps counts most"


def toy_divergences(kl: str, *, kept_only: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected gradient of an estimator at drawn tokens, and of the divergence that it stands for: by enumeration."""
    start, reference = Toy(3, 2, seed=1), Toy(3, 2, seed=5)
    every = joined(every_trajectory(start, 2, schedule="linear"))
    p, policy = log_likelihood(start, every).exp(), start.moved(0.0)
    found = []
    for kind in (kl, {"k2": "reverse", "k3": "ce"}[kl]):
        at = positions_of(every, all_drawn=True)
        away = score(policy, every, at, reference=reference, kl=DIVERGENCES[kind]).kl
        chosen = every.kept[at.place] if kept_only else torch.ones_like(away, dtype=torch.bool)
        found.append(torch.autograd.grad((p[at.place[0]] * away)[chosen].sum(), policy.weights)[0])
    return tuple(found)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_estimators_at_all_drawn_tokens_have_the_gradient_of_their_divergence_and_at_kept_ones_not(kl):
    found, true = toy_divergences(kl)
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-4)
    found, true = toy_divergences(kl, kept_only=True)
    assert (found - true).abs().max() > 0.02, "kept tokens are a selection"


def test_the_loss_takes_sampled_estimators_at_all_drawn_tokens():
    """Expected over all trajectories, k3's term is that of the cross-entropy at all masked positions."""
    start, reference = Toy(3, 2, seed=1), Toy(3, 2, seed=5)
    every = every_trajectory(start, 2, schedule="linear")
    p, policy = log_likelihood(start, every).exp(), start.moved(0.0)
    found, zeros = torch.zeros_like(policy.weights), torch.zeros(1)
    how = {"kl": "k3", "kl_weight": 64.0, "reference": reference}  # in 2 steps it weighs (2 / 16)^2
    for i in range(len(every)):
        found += p[i] * gradient_of(policy, every[i : i + 1], zeros, zeros, **how)
    at = positions_of(every, all_drawn=True)
    away, where = score(policy, every, at, reference=reference, kl=ce_kl).kl, (at.sample, at.step)
    share = every.kept[where].sum(1) / (every.states[where] == 2).sum(1)
    (true,) = torch.autograd.grad((away * share[at.row] * p[at.place[0]]).sum(), policy.weights)
    torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)


def test_policy_and_reference_get_the_same_logit_scale():
    logits, other, scale = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0])
    tokens, known = torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5, dtype=torch.bool)
    for kl in DIVERGENCES.values():
        token, away, missed = score_logits(logits, other, None, None, tokens, scale, known, kl=kl)
        torch.testing.assert_close(away, kl(logits * scale[:, None], other * scale[:, None], tokens))
        assert not score_logits(logits, logits, None, None, tokens, scale, known, kl=kl).kl.any() and not missed.any()
    torch.testing.assert_close(token, (logits * scale[:, None]).log_softmax(-1)[torch.arange(5), tokens])
    assert not score_logits(logits, other, None, None, tokens, scale, known, kl=None).kl.any()


def test_the_teacher_is_taken_at_its_own_scale():
    random = torch.Generator().manual_seed(0)
    (logits, other, teacher), scale = torch.randn(3, 5, 4, generator=random), torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0])
    unknown = torch.tensor([False, True, False, False, True])
    found = score_logits(logits, other, teacher, None, torch.zeros(5, dtype=torch.int64), scale, unknown, kl=None)
    p, q, r = (logits * scale[:, None]).softmax(-1), teacher.softmax(-1), (other * scale[:, None]).softmax(-1)
    expected = torch.where(unknown, (r * (r / p).log()).sum(-1), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(found.hindsight, expected)
    assert not found.kl.any()


@pytest.mark.parametrize("kl", ["ce", "reverse", "k2", "k3"])
def test_at_the_reference_the_divergence_and_its_gradient_are_zero(kl):
    policy = TOY.moved(0.0)
    trajectory = sampled(policy, [2, 4, 8], remask=0.5)
    loss, stats = loss_of(policy, trajectory, torch.zeros(3), ONES[:3], reference=TOY, kl=kl, kl_weight=10.0)
    assert stats["kl"] == 0 and torch.autograd.grad(loss, policy.weights)[0].abs().max() < 1e-5


def test_the_divergence_weighs_less_in_few_steps_and_its_metric_does_not():
    policy, trajectory = TOY.moved(0.5), sampled(TOY, [2, 4, 8])

    def held(i: slice) -> tuple[float, float]:
        part = trajectory[i]
        loss, stats = loss_of(policy, part, torch.zeros(len(part)), ONES[: len(part)], reference=TOY, kl_weight=1.0)
        return loss.item(), stats["kl"].item()

    alone = [held(slice(i, i + 1)) for i in range(3)]
    for (loss, away), steps in zip(alone, (2, 4, 8), strict=True):
        assert away > 0.1 and loss == pytest.approx(away * (steps / 16) ** 2, rel=1e-4)
    assert held(slice(0, 3)) == pytest.approx(tuple(sum(x) for x in zip(*alone, strict=True)), rel=1e-4)


PROMPTS, STEPS = ["an owl", "a cat", "a dog", "a fox"], torch.tensor([1, 4, 2, 8])


def disturbed(transformer: torch.nn.Module) -> torch.nn.Module:
    """A copy with other weights: what a policy is after some updates."""
    model, random = copy.deepcopy(transformer), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


def generated(generator, guidance: float, **how):
    """A rollout of four prompts by a generator, and its policy."""
    policy = make_policy(generator, PROMPTS, guidance=guidance)
    noise = draw_noise(4, int(STEPS.max()), 16, seed=0)
    return policy, rollout(policy, STEPS, noise, Sampler(**how))


@pytest.mark.parametrize("at_once", [70, 2**24], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("likelihood", "guidance", "kl"), [("exact", 2.5, "ce"), ("token", 1.0, "k3")])
def test_loss_and_gradient_are_those_of_a_plain_loop(tiny_generator, monkeypatch, likelihood, guidance, kl, at_once):
    monkeypatch.setitem(score.__kwdefaults__, "at_once", at_once)
    base, trajectory = generated(tiny_generator, guidance, remask=0.5)
    keep, found = torch.tensor([1.0, 1.0, 0.0, 1.0]), []
    for plain in (False, True):
        moved = tiny_generator._replace(transformer=disturbed(tiny_generator.transformer).train())
        policy = make_policy(moved, PROMPTS, guidance=guidance)
        if plain:
            loss = plain_loss(policy, base, trajectory, keep, likelihood=likelihood, kl=kl)
        else:
            loss, stats = loss_of(policy, trajectory, ADVANTAGES, keep, reference=base, likelihood=likelihood, kl=kl,
                                  kl_weight=3.0, on_policy=False)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in moved.transformer.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert stats["clipped"] > 0 and stats["kl"] > 0.01
    largest = max(g.abs().max().item() for g in found[1][1].values() if g is not None)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=2e-5 * max(1, largest), rtol=1e-4)


def plain_loss(policy, reference, trajectory, keep, *, likelihood: str, kl: str) -> torch.Tensor:
    """The same, step after step, with log-softmax over the codebook at every position of every step."""
    total, samples, everywhere = torch.zeros(()), torch.arange(4), torch.arange(16).expand(4, -1)
    for s in range(int(STEPS.max())):
        given = (trajectory.states[:, s], trajectory.timestep[:, s], samples, everywhere)
        scale = trajectory.logit_scale[:, s, None, None]
        logits, drawn = policy(*given) * scale, trajectory.drawn[:, s]
        with torch.no_grad():
            reference_logits = reference(*given) * scale
        masked, kept = trajectory.states[:, s] == trajectory.states[:, 0].max(), trajectory.kept[:, s]
        log_p, old = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1), trajectory.log_probs[:, s]
        if likelihood == "exact":
            fixed = (trajectory.rank[:, s], masked, kept, trajectory.temperature[:, s])
            new, terms = step_log_prob(log_p, *fixed)
            ratio, weight = (new - step_log_prob(old, *fixed)[0]) / terms.clamp(min=1), terms * keep
            advantages = ADVANTAGES
        else:
            last = kept & ~trajectory.kept[:, s + 1 :].any(1)  # what is drawn again later is not in the image
            ratio, weight, advantages = (log_p - old).masked_fill(~last, 0), last * keep[:, None], ADVANTAGES[:, None]
        total = total + policy_loss(ratio, advantages, weight)[0]
        away = DIVERGENCES[kl](logits, reference_logits, drawn)
        share = kept.sum(1) / masked.sum(1).clamp(min=1)
        away = (away * kept).sum(1) if kl == "ce" else (away * masked).sum(1) * share
        total = total + 3.0 * (away * (STEPS / 16) ** 2).sum()  # of all samples
    return total


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


class WithHead(Toy):
    """A policy with a head: 8 features, 64 codes."""

    def __init__(self, seed: int):
        super().__init__(40, 64)
        random = torch.Generator().manual_seed(seed)
        self.head = torch.randn(8, 64, generator=random).requires_grad_()
        self.table = torch.randn(65, 8, generator=random)

    def features(self, tokens, timestep, samples):
        return self.table[tokens][None]

    def logits(self, features):
        return features.squeeze(-2) @ self.head


@pytest.mark.parametrize("kl", ["ce", "reverse", "k3"])
def test_logits_of_all_positions_are_never_there_at_once(kl):
    """Forward and backward, with the same values and gradients; the backward pass keeps fewer still."""
    policy, reference = WithHead(0), WithHead(1)
    trajectory = sampled(policy, [2] * 8)
    teacher = teacher_features(reference, trajectory.tokens.clone().index_fill(1, torch.arange(20), 64), mask_id=64)
    at = positions_of(trajectory, all_drawn=True)
    kept, count = [], len(at.position)

    def run(limit: int):
        kept.clear()
        policy.head.grad = None
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                found = score(policy, trajectory, at, reference=reference, kl=DIVERGENCES[kl], teacher=teacher,
                              at_once=limit)
            sum(part.sum() for part in found).backward()
        return largest.numbers, max(kept), *(part.detach() for part in found), policy.head.grad

    dense, chunks = run(count * 64), run(4096)
    assert dense[0] >= count * 64 and dense[1] >= count * 64
    assert chunks[0] < count * 64 / 3 and chunks[1] < count * 64 / 3
    for one, other in zip(dense[2:], chunks[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_only_drawn_or_kept_positions_are_scored_and_none_is_padded():
    trajectory = sampled(TOY, [1, 4, 2, 8], remask=0.5)
    for all_drawn in (False, True):
        at = positions_of(trajectory, every_step(trajectory), all_drawn=all_drawn)
        assert len(at.step) == trajectory.steps.sum()
        expected = trajectory.masked if all_drawn else trajectory.kept
        assert torch.equal(torch.stack(at.place, 1), expected.nonzero())
        assert (at.row.diff() >= 0).all()
        for one, other in zip(at, positions_of(trajectory, all_drawn=all_drawn), strict=True):
            assert torch.equal(one, other), "None is every step"
    one = torch.zeros_like(every_step(trajectory))
    one[1, 2] = True
    assert [part.unique().tolist() for part in positions_of(trajectory, one).place[:2]] == [[1], [2]]


def test_nothing_is_compiled_again_after_the_first_iteration(tiny_generator):
    """Mixed step counts: batches shrink as samples finish, and micro-batches differ in rows and positions."""
    torch._dynamo.reset()
    model = copy.deepcopy(tiny_generator.transformer)
    reference = copy.deepcopy(model).requires_grad_(False)
    for network in (model, reference):
        network.compile_blocks(backend="eager")  # traces, guards and recompiles as the real one does
    decide = torch.compile(step, dynamic=True, backend="eager")
    scoring = torch.compile(score_logits, dynamic=True, backend="eager")

    def iteration(counts: list[int]) -> None:
        policy, held = (make_policy(tiny_generator._replace(transformer=m), PROMPTS, guidance=1.0)
                        for m in (model, reference))
        steps = torch.tensor(counts)
        noise = draw_noise(4, max(counts), 16, seed=0)
        done = rollout(policy, steps, noise, Sampler(remask=0.5), step=decide)
        finished = hide(done.tokens, noise.uniform[:, 0], share=0.75, mask_id=done.mask_id)
        loss, _ = grpo_loss(policy, held, done, ADVANTAGES, ONES, every_step(done), likelihood=token_events, kl=ce_kl,
                            hindsight=1.0, finished=finished, score_logits=scoring)
        loss.backward()

    iteration([1, 4, 2, 3])
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert seen >= 2, "the blocks were compiled"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ([4, 4, 4, 4], [2, 1, 1, 5], [16, 3, 2, 7], [1, 1, 1, 1]):
            iteration(counts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen
