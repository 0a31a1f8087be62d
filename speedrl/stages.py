"""What happens once before training: the search of the sampler, and the base's quality gap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speedrl.learner import SamplerSettings
from speedrl.method.advantages import group_advantages
from speedrl.method.sampling import draw_noise, rollout
from speedrl.method.search import Scalars, ask, new_search, scalars_at, tell
from speedrl.models.generator import Generator, decode
from speedrl.policies import make_policy
from speedrl.rewards.mixing import Reward

Quality = Callable[[Tensor, list[str]], Tensor]  # images [B, 3, H, W] in [0, 1] and B prompts -> [B]


def draw_images(
    generator: Generator,
    prompts: list[str],
    steps: Tensor,
    *,
    seed: int,
    names: Sequence[str] | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    schedule: str | None = None,
    order: str | None = None,
    remask: float | None = None,
    scalars: Scalars | None = None,
) -> Tensor:
    """Images float32 [B, 3, H, W] of B prompts, each in its own number of steps int64 [B]; None is the generator's own.

    Image i starts from the noise of sample i of the seed, or of the sample that `names` names.
    """
    length = generator.grid[0] * generator.grid[1]
    policy = make_policy(generator, prompts, guidance=guidance)
    device = policy.empty.text.device
    noise = draw_noise(len(steps), int(steps.max()), length, seed=seed, names=names, device=device)
    drawn = rollout(
        policy, steps.to(device), noise, grid=generator.grid, mask_id=generator.mask_id, scalars=scalars,
        temperature=generator.temperature if temperature is None else temperature,
        schedule=schedule or generator.schedule, order=order or generator.order,
        remask=generator.remask if remask is None else remask,
    )
    return decode(generator, drawn.tokens)


def search_sampler(
    generator: Generator,
    prompts: Sequence[str],
    quality: Quality,
    choices: Tensor,
    *,
    rounds: int = 64,
    groups: int = 5,
    group_size: int = 8,
    seed: int = 0,
    table: Tensor | None = None,
    **sampler,
) -> Tensor:
    """Searches the sampler's scalars for the step counts `choices`, int64 [K], on the given prompts, without training.

    Each round draws `group_size` images of `groups` prompts, the counts in turn, each with its own scalars, and moves
    the scalars along the gradient of the expected quality (`method.search`). Pairs of images start from the same noise
    and try opposite scalars. It starts from `table` or from the given sampler; `sampler` is what `draw_images` takes.
    -> table float32 [7, 4] for `scalars_at`.
    """
    search, random = new_search(table), torch.Generator().manual_seed(seed)
    size = groups * group_size
    for number in range(rounds):
        picked = torch.randint(len(prompts), (groups,), generator=random).tolist()
        texts = [prompts[i] for i in picked for _ in range(group_size)]
        # a group shares its count, so that its images compare
        counts = choices[(torch.arange(groups) + number) % len(choices)].repeat_interleave(group_size)
        scalars, noise = ask(search, counts, seed=seed, round=number)
        names = [f"search,{number},{i // 2}" for i in range(size)]
        images = draw_images(generator, texts, counts, seed=seed, names=names, scalars=scalars, **sampler)
        advantages = group_advantages(quality(images, texts).view(groups, -1), std="none").flatten()
        search = tell(search, counts, noise, advantages)
    return search.table


def quality_gap(
    generator: Generator,
    prompts: Sequence[str],
    quality: Quality,
    most: int,
    *,
    count: int = 32,
    seed: int = 0,
    table: Tensor | None = None,
    **sampler,
) -> float:
    """The generator's mean quality at its most steps less that at one, over `count` prompts and equal noise.

    It is the unit of --steps-reward. Where quality does not rise with the steps by more than two standard errors it is
    the standard deviation of the quality, and 1 where that is 0 too. `sampler` is what `draw_images` takes.
    """
    texts = (list(prompts[:count]) * count)[:count]

    def at(steps: int) -> Tensor:
        counts = torch.full((count,), steps)
        images = draw_images(generator, texts, counts, seed=seed, scalars=scalars_at(table, counts), **sampler)
        return quality(images, texts).float()

    many, one = at(most), at(1)
    gains = many - one
    rises = gains.mean() > 2 * gains.std() / count**0.5
    return gains.mean().item() if rises else many.std(correction=0).item() or 1.0


def prepare_sampler(
    record: Mapping[str, Any],
    generator: Generator,
    prompts: Sequence[str],
    reward: Reward,
    how: SamplerSettings,
    choices: Tensor,
    *,
    rounds: int,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor | None, float]:
    """The sampler's table for `scalars_at`, None without one, and the quality gap: of a checkpoint's record, or new.

    `rounds` of search start from the generator's own table, if it has one; the gap is that of the searched sampler.
    `between` is called after each batch of images: what it raises ends the stage.
    """
    if "gap" in record:
        return (None if record["search"] is None else torch.tensor(record["search"])), record["gap"]
    sampler = how._asdict()
    del sampler["reference_guidance"]

    def quality(images: Tensor, texts: list[str]) -> Tensor:
        between()
        return reward.observe(reward.parts(images, texts), len(texts)).cpu()

    table = generator.sampler.get("search")
    if rounds and reward.scores:
        table = search_sampler(generator, prompts, quality, choices, rounds=rounds, seed=seed, table=table,
                               **sampler)
    gap = 1.0
    if reward.scores and len(choices) > 1:
        gap = quality_gap(generator, prompts, quality, int(choices.max()), table=table, seed=seed, **sampler)
    reward.recent.clear()  # the qualities of these stages are of other samplers, no trend of the training
    return table, gap
