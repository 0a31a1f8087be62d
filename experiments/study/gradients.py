"""How noisy the gradient is under each KL estimator and each likelihood: `python -m experiments.study.gradients`.

Curves of training are noisy themselves; this measures at one parameter vector, over many batches of rollouts. Every
estimator sees the same rollouts. The reference of each is the mean gradient of the estimator that is exact given the
state, over batches of its own:

    ce, k3                   gradient of KL(reference policy || policy)    reference: ce
    reverse, k2, k1          gradient of KL(policy || reference policy)    reference: reverse; k1's expectation is 0
    token, sequence, exact   gradient of the clipped surrogate             reference: exact

What is said of k1, k2 and k3 holds for tokens drawn from the policy. Those that are revealed by confidence are chosen
among the drawn, which adds a bias that ce and reverse do not have: compare `--order random`, where there is none.
Where the policy that trains is the one that sampled, every ratio is 1 and token and sequence have the same gradient:
`--stale` lets an older policy sample. References are always on-policy: that of exact is the gradient of the reward.
"""

import copy
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from typer import Option

from speedrl.cli import in_one_line
from speedrl.evaluation.pages import Section, write_page
from speedrl.generation import guided_policy
from speedrl.method.advantages import group_advantages
from speedrl.method.losses import normalise
from speedrl.method.sampling import Rollout, draw_noise, rollout
from speedrl.method.schedules import step_range
from speedrl.models.checkpoint import Generator, Prompts, codebook, decode, encode_prompts, load_generator, repeat, take
from speedrl.rewards.loading import Score, load_quality
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import bf16_autocast, bf16_is_fast
from speedrl.training import draw_prompts, draw_steps, training_prompts
from speedrl.updates import micro_batch_loss, rows

REFERENCE = {
    "ce": "ce", "k3": "ce", "reverse": "reverse", "k2": "reverse", "k1": "reverse",
    "token": "exact", "sequence": "exact", "exact": "exact",
}  # fmt: skip
LIKELIHOODS = ("token", "sequence", "exact")


class Batch(NamedTuple):
    """Rollouts of G groups of n, and what their loss needs."""

    rollout: Rollout
    prompts: Prompts
    advantages: Tensor  # [G * n, S]
    texts: list[str]  # of G * n
    rewards: Tensor  # [G * n]


class Tally(NamedTuple):
    """Sums over the gradients of one estimator, P parameters."""

    total: Tensor  # [P]
    squares: float  # sum of squared norms
    cosines: list[float]  # of each with the reference

    def add(self, gradient: Tensor, reference: Tensor | None) -> "Tally":
        cosine = [] if reference is None else [torch.cosine_similarity(gradient, reference, dim=0).item()]
        return Tally(self.total + gradient, self.squares + gradient.square().sum().item(), self.cosines + cosine)


@torch.no_grad()
def draw(
    generator: Generator, texts: list[str], score: Score, *, steps: str, groups: int, group_size: int, guidance: float,
    temperature: float, order: str, seed: int, number: int, bf16: bool = False,
) -> Batch:  # fmt: skip
    """Batch `number` of a seed: rollouts of the generator, rewarded by `score`."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + number)
    bounds, size = step_range(steps), groups * group_size
    if bounds.chosen:
        raise ValueError("the study compares estimators of the tokens alone: give a number of steps or a range")
    device = next(generator.transformer.parameters()).device
    chosen = draw_prompts(len(texts), groups, random).repeat_interleave(group_size)
    counts = draw_steps(bounds, groups, group_size, random, shared=False).to(device)
    length = generator.grid[0] * generator.grid[1]
    noise = draw_noise(size, bounds.most, length, seed=seed, first=number * size, device=device)
    wanted = [texts[i] for i in chosen]
    prompts, empty = encode_prompts(generator, wanted), encode_prompts(generator, [generator.negative])
    policy = guided_policy(generator.transformer, prompts, empty, guidance=guidance, grid=generator.grid)
    with bf16_autocast(device, enabled=bf16):
        done = rollout(
            policy, counts, noise, length=length, mask_id=generator.mask_id, temperature=temperature, order=order,
            grid=generator.grid, record=True, guess=True,
        )  # fmt: skip
    rewards = score(decode(generator, done.tokens), wanted).to(device)
    advantages = group_advantages(rewards.view(groups, -1)).view(-1, 1)
    return Batch(done, prompts, advantages.expand(done.countdown.shape), wanted, rewards)


def gradient(
    generator: Generator, reference: nn.Module, batch: Batch, name: str, *, guidance: float, order: str,
    slopes: Tensor | None = None, micro_batch: int = 16, bf16: bool = False,
) -> Tensor:  # fmt: skip
    """Gradient of one estimator's loss at the generator's parameters, a token on average: float32 [P].

    A KL estimator alone, without the surrogate; or the surrogate with a likelihood, without KL, where `slopes` are in
    the place of the advantages if they are given.
    """
    transformer, (done, prompts, advantages, *_) = generator.transformer, batch
    of_kl = name not in LIKELIHOODS
    learned = [p for p in transformer.parameters() if p.requires_grad]
    empty = encode_prompts(generator, [generator.negative])
    weights = torch.ones_like(done.log_probs)
    every = torch.arange(int(done.steps.max()), device=done.steps.device) < done.steps[:, None]  # bool [B, S]
    found = torch.zeros(sum(p.numel() for p in learned), device=weights.device)
    for index in torch.arange(len(advantages), device=weights.device).split(micro_batch):
        part = Rollout(*(None if field is None else field[index] for field in done))
        states = rows(part, every[index], mask_id=generator.mask_id, every_place=name == "exact")
        with bf16_autocast(weights.device, enabled=bf16):
            loss, _ = micro_batch_loss(
                transformer, reference if of_kl else None, part, states, take(prompts, index[states.sample]),
                repeat(empty, len(states.sample)), advantages[index] * (not of_kl), weights[index], grid=generator.grid,
                guidance=guidance, reference_guidance=guidance, order=order, likelihood="token" if of_kl else name,
                clip_range=0.2, kl=name if of_kl else "none", kl_weight=1.0, codes=codebook(generator),
                slopes=None if slopes is None else slopes[index],
            )  # fmt: skip
        parts = torch.autograd.grad(normalise(loss, weights.sum()), learned, allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(learned, parts, strict=True))
        found += torch.cat([g.flatten() for g in zeros])
    return found


def summary(tally: Tally, reference: Tensor, count: int) -> dict[str, float]:
    """What `count` gradients say of their estimator.

    variance: the trace of the covariance of one batch's gradient. signal: squared norm of its mean, with the part that
    is variance taken off (so it may be under 0 where there is none). noise_to_signal: their ratio, None where the
    signal is not above 0. cosine: of one batch's gradient with the reference, and its spread. cosine_of_mean: of the
    mean over batches: what is left below 1 is bias, and noise of both means.
    """
    variance = (tally.squares - tally.total.square().sum().item() / count) / (count - 1)
    signal = (tally.total / count).square().sum().item() - variance / count
    cosines = torch.tensor(tally.cosines)
    return {
        "variance": variance,
        "signal": signal,
        "noise_to_signal": variance / signal if signal > 0 else None,
        "cosine": cosines.mean().item(),
        "cosine_spread": cosines.std().item(),
        "cosine_of_mean": torch.cosine_similarity(tally.total, reference, dim=0).item(),
    }


def perturbed(transformer: nn.Module, *, away: float, seed: int) -> None:
    """Moves every weight matrix by noise of `away` times its own root mean square, in place: a policy off its start."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in transformer.parameters():
            noise = torch.randn(p.shape, generator=random).to(p)
            p += away * p.square().mean().sqrt() * noise


def study(
    generator: Generator,
    reference: nn.Module,
    texts: list[str],
    score: Score,
    *,
    names: tuple[str, ...] = tuple(REFERENCE),
    batches: int = 64,
    reference_batches: int = 128,
    groups: int = 8,
    group_size: int = 8,
    steps: str = "8",
    guidance: float = 1.0,
    order: str = "confidence",
    behaviour: Generator | None = None,
    seed: int = 0,
    bf16: bool = False,
) -> list[dict[str, Any]]:
    """A row for each estimator: `summary`, and cosine_of_reference, that of the two halves of its reference.

    `behaviour` samples the batches that are compared in place of `generator`, which samples those of the reference.
    `bf16`: products in it, as in training.
    ValueError for fewer than two batches of either kind.
    """
    if min(batches, reference_batches) < 2:
        raise ValueError("a variance needs at least 2 batches, and a reference 2")
    settings = {"guidance": guidance, "order": order, "bf16": bf16}
    drawn = {"steps": steps, "groups": groups, "group_size": group_size, "seed": seed,
             "temperature": generator.temperature}  # fmt: skip
    size = sum(p.numel() for p in generator.transformer.parameters() if p.requires_grad)

    def nothing(which: set[str]) -> dict[str, Tensor]:
        return {name: torch.zeros(size, device=next(generator.transformer.parameters()).device) for name in which}

    exact = {REFERENCE[name] for name in names}
    halves = nothing(exact), nothing(exact)
    for number in track(range(reference_batches), "reference"):
        batch = draw(generator, texts, score, number=batches + number, **drawn, **settings)
        for name in exact:
            halves[number % 2][name] += gradient(generator, reference, batch, name, **settings)
    tallies = {name: Tally(total, 0.0, []) for name, total in nothing(set(names)).items()}
    means = {name: halves[0][name] + halves[1][name] for name in exact}
    for number in track(range(batches), "gradients"):
        batch = draw(behaviour or generator, texts, score, number=number, **drawn, **settings)
        for name in names:
            found = gradient(generator, reference, batch, name, **settings)
            tallies[name] = tallies[name].add(found, means[REFERENCE[name]])
    return [
        {"estimator": name, "reference": REFERENCE[name], **summary(tallies[name], means[REFERENCE[name]], batches),
         "cosine_of_reference": torch.cosine_similarity(*(half[REFERENCE[name]] for half in halves), dim=0).item()}
        for name in names
    ]  # fmt: skip


def in_words(found: list[dict[str, Any]]) -> list[str]:
    """Each estimator beside its reference, in numbers."""
    by_name, words = {row["estimator"]: row for row in found}, []
    for row in found:
        other = by_name.get(row["reference"])
        if other is None or row is other:
            continue
        if row["estimator"] == "k1":
            words.append(f"k1: cosine {row['cosine_of_mean']:.2f} of its mean with that of reverse.")
            continue
        times, whole = row["variance"] / other["variance"], other["estimator"]
        words.append(
            f"{row['estimator']}: {times:.3g} times the variance of {whole}; one batch has cosine {row['cosine']:.2f} "
            f"with the reference ({whole} {other['cosine']:.2f}), the mean {row['cosine_of_mean']:.2f} ({whole} "
            f"{other['cosine_of_mean']:.2f})."
        )
    return words


def write(out: Path, name: str, title: str, found: list[dict[str, Any]], words: list[str], about: dict) -> None:
    """Writes OUT/NAME.json, OUT/NAME.md and OUT/index.html of a table and what it says, and prints it."""
    header = [key.replace("_", " ") for key in found[0]]
    lines = [
        [f"{v:.4g}" if isinstance(v, float) else "–" if v is None else str(v) for v in row.values()] for row in found
    ]
    rule = ["--:" if isinstance(v, float | int | None) else "---" for v in found[0].values()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
    text = f"# {title}\n\n" + table + "\n\n" + "\n\n".join(words) + "\n"
    write_json(out / f"{name}.json", about | {"rows": found})
    write_atomically(out / f"{name}.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    write_page(out / "index.html", title, [Section(about["model"], words, tables=[(header, lines)])])
    Console().print(text, soft_wrap=True, highlight=False)
    print(json.dumps({"wrote": str(out / "index.html")}))


def main(
    *,
    model: Annotated[
        str, Option(help="The policy: a run, off its base; or the base itself, moved by --away.")
    ] = "embedded",
    base: Annotated[str, Option(help="The reference policy.")] = "embedded",
    out: Annotated[Path, Option(help="Where the results go.")] = Path("runs/gradients"),
    away: Annotated[float, Option(help="Noise on the weights, relative, where model and base are the same.")] = 0.02,
    stale: Annotated[float, Option(help="Noise on the weights of the policy that samples; 0 is on-policy.")] = 0.0,
    prompts: Annotated[str | None, Option(help="File of prompts. [default: the embedded model's]")] = None,
    quality: Annotated[str, Option(help="As of speedrl train.")] = "embedded",
    steps: Annotated[str, Option(help="Steps of the rollouts: 8, or 2-16.")] = "8",
    guidance: Annotated[float, Option(help="Guidance of the rollouts.")] = 1.0,
    order: Annotated[str, Option(help="Reveal order of the rollouts: confidence, random or halton.")] = "confidence",
    batches: Annotated[int, Option(help="Batches whose gradients are compared.")] = 64,
    reference_batches: Annotated[int, Option(help="Batches of the reference.")] = 128,
    groups: Annotated[int, Option(help="Prompts of a batch.")] = 8,
    group_size: Annotated[int, Option(help="Pictures of a prompt.")] = 8,
    seed: Annotated[int, Option(help="Of prompts, noise and --away.")] = 0,
    compile: Annotated[bool, Option(help="Use torch.compile.")] = True,
    device: Annotated[str, Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure the variance of the gradient under each KL estimator and each likelihood."""
    generator = load_generator(model, device=device)
    reference = copy.deepcopy(load_generator(base, device=device).transformer).requires_grad_(False)
    if model == base:
        perturbed(generator.transformer, away=away, seed=seed)
    behaviour = generator._replace(transformer=copy.deepcopy(generator.transformer)) if stale else None
    if behaviour:
        perturbed(behaviour.transformer, away=stale, seed=seed + 1)
    if compile:
        for network in (generator.transformer, reference, *([behaviour.transformer] if behaviour else [])):
            network.compile_blocks()
    texts = list(training_prompts(base, prompts))
    found = study(
        generator, reference, texts, load_quality(quality, device=device), batches=batches, groups=groups,
        reference_batches=reference_batches, group_size=group_size, steps=steps, guidance=guidance, order=order,
        behaviour=behaviour, seed=seed, bf16=bf16_is_fast(device),
    )  # fmt: skip
    about = {"model": model, "base": base, "order": order, "stale": stale, "away": away, "seed": seed,
             "bf16": bf16_is_fast(device)}  # fmt: skip
    write(out, "gradients", "Noise of the gradient", found, in_words(found), about)


if __name__ == "__main__":
    typer.run(in_one_line(main))
