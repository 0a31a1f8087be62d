"""What a researcher builds in 20 lines: a loss, a divergence, a likelihood, a step policy and a reward of one's own."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import speedrl
from speedrl.method.divergences import ce_kl, reverse_kl
from speedrl.method.ratios import token_events
from tests.toys import Toy, log_likelihood, sampled


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    """A short training of a generator of one's own, in Python alone."""
    return dict(model=speedrl.load_model(tiny_generator_folder), quality=redness, prompts=["a b", "c d", "e f"],
                steps="3", iterations=2, groups=2, group_size=4, search=0, compile=False, bf16=False, lr=3e-3,
                out=tmp_path / "run")


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def dpo_loss(policy, reference, better, worse, *, beta: float = 0.5) -> Tensor:
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290) on pairs of rollouts: the mean over pairs."""

    def gain(trajectory) -> Tensor:
        kept = trajectory.kept
        with torch.no_grad():
            held = (speedrl.token_log_probs(reference, trajectory) * kept).sum((1, 2))
        return (speedrl.token_log_probs(policy, trajectory) * kept).sum((1, 2)) - held

    return -F.logsigmoid(beta * (gain(better) - gain(worse))).mean()


def test_a_dpo_loss_on_pairs_of_rollouts_makes_the_better_ones_likelier():
    reference = Toy(4, 3)
    policy, rollouts = reference.moved(0.0), sampled(reference, [1, 2] * 40)
    worth = (rollouts.tokens == 0).float().sum(1) + 0.01 * torch.arange(80)  # no two alike
    pairs = [torch.stack([i, i + 2]) for i in torch.arange(0, 80) if i % 4 < 2]  # of equal step count
    pairs = torch.stack([pair[worth[pair].argsort(descending=True)] for pair in pairs])
    better, worse = rollouts[pairs[:, 0]], rollouts[pairs[:, 1]]
    assert dpo_loss(policy, reference, better, worse).item() == pytest.approx(torch.tensor(2.0).log().item())
    optimizer = torch.optim.Adam([policy.weights], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        loss = dpo_loss(policy, reference, better, worse)
        loss.backward()
        optimizer.step()
    assert loss < 0.4
    before, after = ((sampled(p, [1, 2] * 200, seed=5).tokens == 0).float().mean() for p in (reference, policy))
    assert after > before + 0.1


def test_the_log_probabilities_of_a_rollout_are_those_of_its_exact_likelihood():
    """In one step, where no positions are chosen, the sum over tokens is the whole log-likelihood."""
    policy = Toy(4, 3).moved(0.0)
    rollouts = sampled(policy, [1] * 5)
    found = (speedrl.token_log_probs(policy, rollouts) * rollouts.kept).sum((1, 2))
    torch.testing.assert_close(found, log_likelihood(policy, rollouts))


@pytest.mark.parametrize("kind", ["ce", "reverse"])
def test_the_divergence_by_hand_is_that_of_the_loss(kind):
    """The policy's and the reference's logits at the positions that the rollout set, and a divergence of the two."""
    reference = Toy(6, 3)
    policy, rollouts = reference.moved(0.4), sampled(reference, [1, 2, 4, 8], remask=0.5)
    at = speedrl.positions_of(rollouts)
    with torch.no_grad():
        held = speedrl.token_logits(reference, rollouts, at)
    by_hand = speedrl.kl(speedrl.token_logits(policy, rollouts, at), held, kind=kind).sum()
    ones, zeros = torch.ones(4), torch.zeros(4)
    loss, stats = speedrl.grpo_loss(
        policy, reference, rollouts, zeros, ones, torch.arange(8) < rollouts.steps[:, None], likelihood=token_events,
        kl={"ce": ce_kl, "reverse": reverse_kl}[kind], kl_weight=1.0)
    torch.testing.assert_close(by_hand.detach(), stats["kl"])
    assert by_hand > 0.1 and len(at.position) == stats["tokens"] == rollouts.kept.sum()


def test_a_divergence_and_a_likelihood_of_ones_own_train_as_the_built_in_ones_that_they_equal(options, tmp_path):
    def my_kl(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        p, r = logits.log_softmax(-1), reference.log_softmax(-1).detach()
        return (p.exp() * (p - r)).sum(-1)

    def my_likelihood(new: Tensor, old: Tensor, trajectory, at) -> speedrl.Events:
        sample, _, _ = at.place
        return speedrl.Events(new - old, sample, trajectory.kept[at.place].float())

    generator = options.pop("model")
    for name, how in (("own", {"kl": my_kl, "likelihood": my_likelihood}), ("built", {"kl": "reverse"})):
        model = generator._replace(transformer=copy.deepcopy(generator.transformer))
        speedrl.train(model=model, reference_guidance=2.0, **how, **options | {"out": tmp_path / name})
    for own, built in zip(rows(tmp_path / "own"), rows(tmp_path / "built"), strict=True):
        for name in built.keys() - {"images_per_second", "compile_seconds"}:
            assert own[name] == pytest.approx(built[name], rel=1e-3, abs=1e-5), name
    assert built["kl"] > 1e-4 and built["grad_norm"] > 0


def test_a_divergence_of_ones_own_is_what_the_loss_adds(options, tmp_path):
    """One that is ten times another gives a metric ten times as large in the first iteration, and another training."""
    generator, found = options.pop("model"), {}
    for factor in (1, 10):
        model = generator._replace(transformer=copy.deepcopy(generator.transformer))
        own = lambda logits, reference, tokens, by=factor: by * ce_kl(logits, reference)  # noqa: E731
        speedrl.train(model=model, kl=own, reference_guidance=1.0, **options | {"out": tmp_path / str(factor)})
        found[factor] = rows(tmp_path / str(factor))
    assert found[10][0]["kl"] == pytest.approx(10 * found[1][0]["kl"], rel=1e-4) and found[1][0]["kl"] > 1e-4
    assert found[10][0]["grad_norm"] != found[1][0]["grad_norm"]


class Lengths(nn.Module):
    """A step policy of one's own: a count for each prompt, whatever its length, by one bias."""

    def __init__(self, choices: Tensor, width: int):
        super().__init__()
        self.register_buffer("choices", choices)
        self.bias = nn.Parameter(torch.tensor([8.0, *[0.0] * (len(choices) - 1)]))
        self.width = width

    def forward(self, pooled: Tensor) -> Tensor:
        assert pooled.shape[-1] == self.width
        return self.bias.log_softmax(-1).expand(len(pooled), -1)


def test_a_step_policy_of_ones_own_says_how_many_steps_prompts_take_and_is_trained(options):
    out = speedrl.train(step_policy=Lengths, steps_reward=0.5, **options | {"steps": "2-8"})
    found = rows(options["out"])
    assert found[0]["steps"] < 2.2, "its bias begins at the fewest steps"
    bias = load_file(options["out"] / "checkpoints/000002/tensors.safetensors")["transformer.steps.bias"]
    assert out.is_dir() and not torch.equal(bias, torch.tensor([8.0, 0.0, 0.0]))


def test_a_generator_prompts_and_a_reward_in_python_are_trained_in_place_and_saved(options):
    generator = options["model"]
    before = {name: value.clone() for name, value in generator.transformer.state_dict().items()}
    out = speedrl.train(**options)
    saved = speedrl.load_model(out)
    assert out == options["out"] / "model" and any(
        not torch.equal(before[name], value) for name, value in generator.transformer.state_dict().items())
    for name, value in saved.transformer.state_dict().items():
        torch.testing.assert_close(value, generator.transformer.state_dict()[name])
    images = speedrl.sample(saved, ["a b", "c d"], steps=2)
    assert images.shape == (2, 3, 16, 16) and redness(images, []).isfinite().all()


def test_the_loop_of_the_docs_in_the_public_names_alone(options):
    """A plain policy gradient: rollouts, rewards, advantages, the clipped loss, a step."""
    generator = options["model"]
    optimizer, prompts = torch.optim.AdamW(generator.transformer.parameters(), lr=1e-2), ["a b"] * 16
    rewards = []
    for iteration in range(12):
        policy = speedrl.make_policy(generator, prompts, guidance=1.0)
        noise = speedrl.draw_noise(16, 2, 16, seed=iteration)
        rollouts = speedrl.rollout(policy, torch.full((16,), 2), noise, generator.sampler.replace(guidance=1.0))
        reward = redness(speedrl.decode(generator, rollouts.tokens), prompts)
        advantages = speedrl.group_advantages(reward[None])[0]
        at = speedrl.positions_of(rollouts)
        new = speedrl.score(policy, rollouts, at).log_probs
        loss, _ = speedrl.policy_loss(new - rollouts.log_probs[at.place], advantages[at.place[0]], torch.ones_like(new))
        optimizer.zero_grad()
        (loss / 16 / 16).backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    assert sum(rewards[-3:]) > sum(rewards[:3])
