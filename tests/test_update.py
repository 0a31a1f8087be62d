"""One update of a rollout against its plain twin: dense logits at every place, nothing in chunks."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speedrl import updates as update
from speedrl.generation import guided_policy
from speedrl.method.divergences import kl as divergence
from speedrl.method.likelihoods import exact_log_prob, log_ratio
from speedrl.method.losses import clipped_loss, normalise
from speedrl.method.sampling import draw_noise, rollout, state, step
from speedrl.method.schedules import temperatures, timesteps
from speedrl.models.checkpoint import encode_prompts, repeat, take
from speedrl.updates import micro_batch_loss, rows, scores, token_weights, trained_steps

GRID, LENGTH = (4, 4), 16
STEPS = torch.tensor([1, 4, 2, 3])
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0])


def disturbed(transformer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy with other weights: what a policy is after some updates."""
    model = copy.deepcopy(transformer)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def sampled(generator, *, guidance: float, record: bool = False, steps: torch.Tensor = STEPS, **options):
    """A rollout of four prompts, and what the loss needs to know of them."""
    prompts = encode_prompts(generator, ["an owl", "a cat", "a dog", "a fox"])
    empty = encode_prompts(generator, [""])
    policy = guided_policy(generator.transformer, prompts, empty, guidance=guidance, grid=GRID)
    noise = draw_noise(len(steps), int(steps.max()), LENGTH, seed=0)
    result = rollout(policy, steps, noise, length=LENGTH, mask_id=generator.mask_id, record=record, **options)
    return result, prompts, empty


def advantages_of(batch, likelihood: str) -> torch.Tensor:
    """[4, S], of each step its own where the likelihood allows it."""
    step = torch.arange(batch.countdown.shape[1])
    return ADVANTAGES[:, None] * (1 + 0.3 * step * (likelihood == "token"))


def loss_of(model, reference, batch, prompts, empty, weights, *, guidance, likelihood, kl, which, mask_id):
    """`micro_batch_loss` of a whole batch at its usual settings."""
    part = rows(batch, which, mask_id=mask_id, every_place=likelihood == "exact")
    return micro_batch_loss(
        model, reference, batch, part, take(prompts, part.sample), repeat(empty, len(part.sample)),
        advantages_of(batch, likelihood), weights, grid=GRID, guidance=guidance, reference_guidance=guidance,
        order="confidence", likelihood=likelihood, clip_range=0.2, kl=kl, kl_weight=0.3,
    )  # fmt: skip


def plain_loss(model, reference, batch, prompts, empty, weights, *, guidance, likelihood, kl, which, mask_id):
    """The same, step after step, with log-softmax over the codebook at every place of every step."""
    policy, before = (guided_policy(m, prompts, empty, guidance=guidance, grid=GRID) for m in (model, reference))
    token, away = batch.log_probs.clone(), torch.zeros_like(batch.log_probs)
    exact_new, exact_old, terms = torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    for s in range(which.shape[1]):
        seen, now = state(batch, s, mask_id=mask_id), (batch.reveal_step == s) & which[:, s, None]
        logits = policy(seen, timesteps(batch.steps)[:, s])
        with torch.no_grad():
            reference_logits = before(seen, timesteps(batch.steps)[:, s])
        drawn = batch.tokens if batch.drawn is None else batch.drawn[:, s]
        log_p = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        token = torch.where(now, log_p, token)
        away = torch.where(now, divergence(logits, reference_logits, drawn, kind=kl), away)
        if likelihood == "exact":
            heat = temperatures(batch.steps)[:, s]
            value, count = exact_log_prob(log_p, batch.rank[:, s], seen == mask_id, now, heat)
            exact_new = exact_new + torch.where(which[:, s], value, 0)
            exact_old = exact_old + torch.where(which[:, s], batch.exact[:, s], 0)
            terms = terms + torch.where(which[:, s], count, 0)
    if likelihood == "exact":
        ratio = log_ratio(exact_new, exact_old, level="exact", terms=terms)
    else:
        ratio = log_ratio(token, batch.log_probs, level=likelihood, weights=weights)
    advantages = advantages_of(batch, likelihood)
    if likelihood == "token":
        advantages = torch.stack([advantages[b, step] for b, step in enumerate(batch.reveal_step)])
    else:
        advantages = advantages[:, 0]
    loss, stats = clipped_loss(ratio, advantages, weights, clip_range=0.2)
    total = (away * weights).sum()
    return loss + 0.3 * total, stats | {"kl": total.detach()}


@pytest.mark.parametrize("at_once", [70, 2**24], ids=["in chunks", "at once"])
@pytest.mark.parametrize(
    ("likelihood", "guidance", "kl", "trained"),
    [("token", 1.0, "ce", None), ("token", 2.5, "ce", 1), ("token", 1.0, "k3", 1), ("token", 2.5, "reverse", None),
     ("sequence", 2.5, "k3", None), ("exact", 2.5, "ce", None)],
)  # fmt: skip
def test_loss_and_gradient_are_the_plain_ones(tiny_generator, monkeypatch, likelihood, guidance, kl, trained, at_once):
    monkeypatch.setitem(scores.__kwdefaults__, "at_once", at_once)
    batch, prompts, empty = sampled(tiny_generator, guidance=guidance, record=likelihood == "exact")
    which = trained_steps(STEPS, trained, torch.Generator().manual_seed(1))
    weights = token_weights(batch, which, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    found = []
    for function in (loss_of, plain_loss):
        model = disturbed(tiny_generator.transformer).train()
        loss, stats = function(
            model, tiny_generator.transformer, batch, prompts, empty, weights, guidance=guidance,
            likelihood=likelihood, kl=kl, which=which, mask_id=tiny_generator.mask_id,
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), stats, {name: p.grad for name, p in model.named_parameters()}))
    (ours, our_stats, our_gradients), (plain, plain_stats, plain_gradients) = found
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_stats, plain_stats, atol=1e-5, rtol=1e-5)
    assert our_stats["kl"].abs() > 1e-3 and abs(our_stats["ratio_max"] - 1) > 1e-4
    assert sum(g is not None and g.abs().max() > 1e-4 for g in our_gradients.values()) > 40
    largest = max(g.abs().max().item() for g in plain_gradients.values() if g is not None)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-5 * max(1, largest), rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


class Head(torch.nn.Module):
    codes = 64

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, self.codes)


@pytest.mark.parametrize("kl", ["ce", "reverse", "k3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_logits_of_all_places_are_never_there_at_once(kl, guidance):
    """Forward and backward: no operation makes more than a chunk of them, and the backward pass keeps fewer still."""
    torch.manual_seed(0)
    policy, reference = Head(), Head().requires_grad_(False)
    places, times, at_once = 500, 1 if guidance == 1 else 2, 4096
    features = torch.randn(places, times, 8, requires_grad=True)
    targets = torch.randint(64, (places,))
    kept = []

    def run(limit: int) -> tuple[int, int]:
        kept.clear()
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
                token, away, _ = scores(
                    policy,
                    reference,
                    features,
                    features.detach(),
                    targets,
                    guidance=guidance,
                    reference_guidance=guidance,
                    kl=kl,
                    at_once=limit,
                )
            (token.sum() + away.sum()).backward()
        return largest.numbers, max(kept, default=0)

    everything = places * times * Head.codes
    dense, in_chunks = run(everything), run(at_once)
    assert dense[0] == everything and dense[1] >= places * Head.codes
    assert in_chunks[0] <= max(at_once, features.numel()) < everything / 3
    assert in_chunks[1] <= features.numel()


def test_only_revealed_places_are_scored_and_none_is_padded(tiny_generator):
    batch, _, _ = sampled(tiny_generator, guidance=1.0)
    which = trained_steps(STEPS, None, torch.Generator())
    part = rows(batch, which, mask_id=tiny_generator.mask_id)
    assert len(part.step) == STEPS.sum() and len(part.targets) == 4 * LENGTH
    where = torch.stack([part.sample[part.row], part.place], 1)
    assert len(where.unique(dim=0)) == 4 * LENGTH, "every token is scored once"
    assert torch.equal(batch.tokens[where[:, 0], where[:, 1]], part.targets)
    assert torch.equal(batch.reveal_step[where[:, 0], where[:, 1]], part.step[part.row])
    assert (part.tokens[part.row, part.place] == tiny_generator.mask_id).all()


def test_without_a_reference_its_work_is_skipped(tiny_generator, monkeypatch):
    batch, prompts, empty = sampled(tiny_generator, guidance=1.0)
    which = trained_steps(STEPS, None, torch.Generator())
    weights = token_weights(batch, which, torch.ones(4))
    calls = []
    monkeypatch.setattr(update, "divergence", lambda *_, **__: calls.append(1))
    loss, stats = loss_of(
        tiny_generator.transformer, None, batch, prompts, empty, weights, guidance=1.0, likelihood="token", kl="ce",
        which=which, mask_id=tiny_generator.mask_id,
    )  # fmt: skip
    assert stats["kl"] == 0 and not calls and loss.isfinite()


def test_a_divergence_held_by_sample_is_the_sum_of_theirs(tiny_generator):
    batch, prompts, empty = sampled(tiny_generator, guidance=1.0)
    part = rows(batch, trained_steps(STEPS, None, torch.Generator()), mask_id=tiny_generator.mask_id)
    model = disturbed(tiny_generator.transformer)

    def held_by(falloff: float, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, stats = micro_batch_loss(
            model, tiny_generator.transformer, batch, part, take(prompts, part.sample), repeat(empty, len(part.sample)),
            torch.zeros(4, 4), weights, grid=GRID, guidance=1.0, reference_guidance=1.0, order="confidence",
            likelihood="token", clip_range=0.2, kl="ce", kl_weight=0.3, kl_falloff=falloff,
        )  # fmt: skip
        return loss.detach(), stats["kl"]

    every, share = torch.ones(4, LENGTH), (STEPS / 16) ** 2
    alone = torch.stack([held_by(0.0, every * (torch.arange(4) == b)[:, None])[0] for b in range(4)])
    loss, away = held_by(2.0, every)
    assert alone.min() > 1e-3
    torch.testing.assert_close(loss, (alone * share).sum())
    torch.testing.assert_close(away, alone.sum() / 0.3)  # what is measured is the divergence, whatever it weighs


def test_what_tokens_are_to_gain_by_slopes_comes_beside_their_advantages(tiny_generator):
    batch, prompts, empty = sampled(tiny_generator, guidance=1.0)
    part = rows(batch, trained_steps(STEPS, None, torch.Generator()), mask_id=tiny_generator.mask_id)
    model, random = disturbed(tiny_generator.transformer), torch.Generator().manual_seed(1)
    slopes, codes = torch.randn(4, LENGTH, 3, generator=random), torch.randn(model.codes, 3, generator=random)

    def gradient(advantages: torch.Tensor, slopes: torch.Tensor | None) -> torch.Tensor:
        loss, _ = micro_batch_loss(
            model, None, batch, part, take(prompts, part.sample), repeat(empty, len(part.sample)), advantages,
            torch.ones(4, LENGTH), grid=GRID, guidance=1.0, reference_guidance=1.0, order="confidence",
            likelihood="token", clip_range=0.2, kl="none", kl_weight=0.0, slopes=slopes, codes=codes,
        )  # fmt: skip
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    advantages = advantages_of(batch, "token")
    alone = gradient(torch.zeros_like(advantages), slopes), gradient(advantages, None)
    assert all(part.norm() > 1e-3 for part in alone)
    torch.testing.assert_close(gradient(advantages, slopes), sum(alone), atol=1e-5, rtol=1e-4)


def test_training_on_some_steps_is_unbiased(tiny_generator):
    """Every choice of K of each sample's N steps, each as likely as another: the mean gradient is that of all steps."""
    steps = torch.tensor([3, 4, 3, 2])
    batch, prompts, empty = sampled(tiny_generator, guidance=1.0, steps=steps)
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0])
    model = disturbed(tiny_generator.transformer)
    parameter = model.project_to_hidden.weight

    def gradient(which: torch.Tensor) -> torch.Tensor:
        loss, _ = loss_of(
            model, tiny_generator.transformer, batch, prompts, empty, token_weights(batch, which, keep), guidance=1.0,
            likelihood="token", kl="ce", which=which, mask_id=tiny_generator.mask_id,
        )  # fmt: skip
        return torch.autograd.grad(normalise(loss, keep.sum() * LENGTH), parameter)[0]

    whole = gradient(torch.arange(4) < steps[:, None])
    # each sample chooses for itself: choices of one at a time, the others training on all, cover them by linearity
    mean = torch.zeros_like(whole)
    for sample, count in enumerate(steps.tolist()):
        chosen = list(itertools.combinations(range(count), 2))
        for subset in chosen:
            which = torch.arange(4) < steps[:, None]
            which[sample] = torch.tensor([s in subset for s in range(4)])
            mean += gradient(which) / len(chosen) / len(steps)
    torch.testing.assert_close(mean, whole, atol=1e-7, rtol=1e-4)
    one = torch.arange(4) < torch.tensor([2, 2, 2, 2])[:, None]
    assert (gradient(one) - whole).abs().max() > 1e-4, "one choice alone is not the mean"


def test_every_choice_of_steps_is_as_likely():
    steps = torch.full((6000,), 4)
    which = trained_steps(steps, 2, torch.Generator().manual_seed(0))
    kinds, counts = which.unique(dim=0, return_counts=True)
    assert len(kinds) == 6 and (which.sum(-1) == 2).all()
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_finished_samples_leave_and_the_head_runs_where_something_is_masked(tiny_generator, guidance):
    prompts = encode_prompts(tiny_generator, ["an owl", "a cat", "a dog", "a fox"])
    empty = encode_prompts(tiny_generator, [""])
    policy = guided_policy(tiny_generator.transformer, prompts, empty, guidance=guidance, grid=GRID)
    asked = []

    def watched(tokens, timestep, samples, places):
        asked.append((samples.tolist(), places.shape[1], len(tokens)))
        return policy(tokens, timestep, samples, places)

    noise = draw_noise(4, 4, LENGTH, seed=0)
    options = {"length": LENGTH, "mask_id": tiny_generator.mask_id}
    plain, sparse = rollout(policy, STEPS, noise, **options), rollout(watched, STEPS, noise, sparse=True, **options)
    assert torch.equal(sparse.tokens, plain.tokens) and torch.equal(sparse.reveal_step, plain.reveal_step)
    torch.testing.assert_close(sparse.log_probs, plain.log_probs, atol=1e-5, rtol=1e-5)
    assert [samples for samples, _, _ in asked] == [[0, 1, 2, 3], [1, 2, 3], [1, 3], [1, 3]]
    masked = [(state(plain, s, mask_id=tiny_generator.mask_id) == tiny_generator.mask_id).sum(1) for s in range(4)]
    assert [count for _, count, _ in asked] == [int(m.max()) for m in masked]
    recorded = rollout(watched, STEPS, noise, sparse=True, record=True, **options)
    assert torch.equal(recorded.tokens, plain.tokens) and asked[-1][1] == LENGTH


def test_nothing_is_compiled_again_after_the_first_iteration(tiny_generator):
    """Mixed step counts: batches shrink as samples finish, and micro-batches differ in rows and places."""
    torch._dynamo.reset()
    model = copy.deepcopy(tiny_generator.transformer)
    reference = copy.deepcopy(model).requires_grad_(False)
    for network in (model, reference):
        network.compile_blocks(backend="eager")  # traces, guards and recompiles as the real one does
    generator = tiny_generator._replace(transformer=model)
    decide = torch.compile(step, dynamic=True, backend="eager")

    def iteration(steps: list[int]) -> None:
        steps = torch.tensor(steps)
        batch, prompts, empty = sampled(generator, guidance=1.0, steps=steps, sparse=True, step=decide)
        which = trained_steps(steps, None, torch.Generator())
        loss, _ = loss_of(
            model, reference, batch, prompts, empty, token_weights(batch, which, torch.ones(4)), guidance=1.0,
            likelihood="token", kl="ce", which=which, mask_id=generator.mask_id,
        )  # fmt: skip
        loss.backward()

    iteration([1, 4, 2, 3])
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert seen >= 2, "the blocks were compiled"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in ([4, 4, 4, 4], [2, 1, 1, 5], [16, 3, 2, 7], [1, 1, 1, 1]):
            iteration(steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen
