"""Divergence estimators against exact expectations over a small codebook."""

import pytest
import torch

from speedrl.method.divergences import DIVERGENCES, SAMPLED, count_weights, hindsight_divergence, kl

CODES = 5
KINDS = list(DIVERGENCES)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    policy, reference = torch.randn(2, CODES, generator=torch.Generator().manual_seed(0))
    return policy.requires_grad_(), reference


def expected(kind: str, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Expected estimate over tokens drawn from the policy; its gradient is that of the estimate, not of the draw."""
    tokens = torch.arange(CODES)
    values = kl(policy.expand(CODES, -1), reference.expand(CODES, -1), tokens, kind=kind)
    return (policy.softmax(-1).detach() * values).sum()


def gradient(value: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, policy)[0]


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_expected_gradient_are_zero_at_the_reference_and_not_off_it(kind):
    policy, reference = logits()
    tokens = torch.arange(CODES)
    same = policy.detach().clone()
    assert torch.equal(kl(policy.expand(CODES, -1), same.expand(CODES, -1), tokens, kind=kind), torch.zeros(CODES))
    at_reference = gradient(expected(kind, policy, same), policy)
    torch.testing.assert_close(at_reference, torch.zeros(CODES), atol=1e-6, rtol=0)
    assert expected(kind, policy, reference) > 0.1
    off = gradient(expected(kind, policy, reference), policy).abs().max()
    assert off > 0.1


def test_expected_k3_is_the_divergence_and_k2_is_biased():
    policy, reference = logits()
    true = exact(policy, reference)
    for kind in ("k3", "reverse"):
        torch.testing.assert_close(expected(kind, policy, reference), true)
    assert abs(expected("k2", policy, reference) - true) > 0.01
    torch.testing.assert_close(expected("ce", policy, reference), exact(reference, policy))


def test_expected_gradients_are_those_of_the_divergence_claimed():
    policy, reference = logits()
    forward = gradient(exact(reference, policy), policy)
    backward = gradient(exact(policy, reference), policy)
    assert (forward - backward).abs().max() > 0.05
    for kind, true in (("ce", forward), ("k3", forward), ("reverse", backward), ("k2", backward)):
        torch.testing.assert_close(gradient(expected(kind, policy, reference), policy), true, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_agrees_with_finite_differences(kind):
    policy, reference = logits()
    token = torch.tensor(2)
    found = gradient(kl(policy, reference, token, kind=kind), policy)
    for i in range(CODES):
        shift = torch.zeros(CODES)
        shift[i] = 0.01
        with torch.no_grad():
            up, down = (kl(policy + d, reference, token, kind=kind) for d in (shift, -shift))
        assert ((up - down) / 0.02).item() == pytest.approx(found[i].item(), abs=1e-3)


def test_reference_has_no_gradient():
    policy, reference = logits()
    reference.requires_grad_()
    for kind in KINDS:
        value = kl(policy, reference, torch.tensor(1), kind=kind)
        assert torch.autograd.grad(value, reference, allow_unused=True)[0] is None


@pytest.mark.parametrize("kind", ["ce", "reverse", "k3"])
def test_excluded_codes_and_half_precision_stay_finite(kind):
    policy = torch.tensor([[1.0, 0.5, -torch.inf]], dtype=torch.bfloat16, requires_grad=True)
    reference = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.bfloat16)
    value = kl(policy, reference, torch.tensor([0]), kind=kind)
    assert value.dtype == torch.float32 and value.shape == (1,) and value > 0
    assert gradient(value.sum(), policy).isfinite().all()


@pytest.mark.parametrize("kind", ["k1", "k4", "none"])
def test_other_kinds_are_named(kind):
    with pytest.raises(ValueError, match=f"`kind` must be ce, reverse, k2, k3, got '{kind}'"):
        kl(*logits(), kind=kind)


def test_estimates_at_drawn_tokens_need_them_and_the_others_do_not():
    for kind in KINDS:
        if DIVERGENCES[kind] in SAMPLED:
            with pytest.raises(ValueError, match="sampled tokens"):
                kl(*logits(), kind=kind)
        else:
            assert kl(*logits(), kind=kind) > 0.1


def test_what_the_teacher_excludes_counts_as_its_floor():
    policy, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -100.0]])  # log-probabilities of about 0 and -100
    half = torch.tensor(0.5).log()
    found = hindsight_divergence(policy, policy, teacher, None, torch.tensor([False]))
    torch.testing.assert_close(found, (0.5 * half + 0.5 * (half + 12))[None])


def test_hindsight_is_the_divergence_from_the_teacher_and_where_nothing_is_known_from_the_reference():
    policy, reference, teacher = torch.randn(3, 2, CODES, generator=torch.Generator().manual_seed(1)).unbind(0)
    found = hindsight_divergence(policy, reference, teacher, None, torch.tensor([False, True]))
    torch.testing.assert_close(found[0], exact(policy[0], teacher[0]))
    torch.testing.assert_close(found[1], exact(reference[1], policy[1]))


def test_hindsight_given_the_noise_of_the_draw_weighs_the_codes_that_it_favours():
    policy, teacher = torch.randn(2, 1, CODES, generator=torch.Generator().manual_seed(1)).unbind(0)
    log_p, log_q, known = policy.log_softmax(-1), teacher.log_softmax(-1), torch.tensor([False])
    noise = torch.linspace(-1, 2, CODES)[None]
    found = hindsight_divergence(policy, policy, teacher, noise, known)
    torch.testing.assert_close(found, ((policy + noise).softmax(-1) * (log_p - log_q)).sum(-1))
    for code in range(CODES):  # noise so strong that it decides the draw
        certain = hindsight_divergence(policy, policy, teacher, 1e4 * torch.eye(CODES)[code][None], known)
        torch.testing.assert_close(certain, (log_p - log_q)[:, code])


def test_fewer_steps_than_sixteen_are_held_less_by_a_power_of_their_share():
    steps = torch.tensor([1, 2, 8, 16, 64])
    assert count_weights(steps, falloff=2.0).tolist() == [1 / 256, 1 / 64, 1 / 4, 1, 1]
    assert count_weights(steps, falloff=0.0).tolist() == [1, 1, 1, 1, 1]
