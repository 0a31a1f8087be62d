"""Images from prompts: the policy of a generator, drawing, and the search of its sampler before training."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from speedrl.method.advantages import group_advantages
from speedrl.method.likelihoods import guided
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, rollout
from speedrl.method.search import Scalars, new_search, perturbed, updated
from speedrl.method.steps import step_log_probs
from speedrl.models.generator import (
    Generator,
    Prompts,
    cat_prompts,
    decode,
    encode_prompts,
    fitting_batch,
    index_prompts,
    repeat_prompts,
)

DEFAULT_STEPS = 8  # of a model without a step policy
Quality = Callable[[Tensor, list[str]], Tensor]  # images [B, 3, H, W] in [0, 1] and B prompts -> [B]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A transformer with what conditions it, of B samples. `policy[index]` selects samples; `rollout` calls it."""

    transformer: Any  # a generator's, or one without its adapter
    prompts: Prompts  # of B samples
    empty: Prompts  # of 1, the negative prompt
    guidance: float  # classifier-free guidance scale; 1 is the conditional network alone
    grid: tuple[int, int]
    mask_id: int

    def __call__(self, tokens: Tensor, timestep: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """Guided logits [n, K, codes]: tokens int64 [n, L], timestep [n], samples int64 [n], positions int64 [n, K].

        One call of the network: on [empty, prompts] with guidance, twice the rows; on the prompts alone at 1.
        """
        features = self.features(tokens, timestep, samples)
        at = positions[..., None].expand(-1, -1, features.shape[-1])
        return self.logits(torch.stack([part.gather(1, at) for part in features], 2))

    def features(self, tokens: Tensor, timestep: Tensor, samples: Tensor) -> Tensor:
        """What the head reads: [T, n, L, C], T = 1 at guidance 1, else 2, the negative prompt's first."""
        times = 1 if self.guidance == 1 else 2
        prompts = index_prompts(self.prompts, samples)
        prompts = prompts if times == 1 else cat_prompts(repeat_prompts(self.empty, len(samples)), prompts)
        rows = tokens.repeat(times, 1).unflatten(1, self.grid)
        return self.transformer.features(rows, timestep.repeat(times), *prompts).unflatten(0, (times, -1))

    def logits(self, features: Tensor) -> Tensor:
        """Guided logits [..., codes] of features [..., T, C]."""
        found = self.transformer.head(features)
        if self.guidance == 1:
            return found.squeeze(-2)
        return guided(found[..., 1, :], found[..., 0, :], self.guidance)

    @property
    def codes(self) -> int:
        return self.transformer.codes

    def __getitem__(self, index: Tensor | slice) -> "Policy":
        """The policy of the samples at `index`, int64 [n] or a slice."""
        return dataclasses.replace(self, prompts=index_prompts(self.prompts, index))


def make_policy(generator: Generator, prompts: Sequence[str], *, guidance: float | None = None) -> Policy:
    """The policy of a generator for B prompts; guidance None is that of the generator's sampler."""
    guidance = generator.sampler.guidance if guidance is None else guidance
    encoded, empty = encode_prompts(generator, list(prompts)), encode_prompts(generator, [generator.negative])
    return Policy(generator.transformer, encoded, empty, guidance, generator.grid, generator.mask_id)


def step_counts(generator: Generator, pooled: Tensor, steps: int | str | Tensor | None) -> Tensor:
    """The number of steps for each pooled text embedding [B, D], int64 [B].

    `steps` is a number, int64 [B], or "auto" for the most likely of the generator's step policy; None is "auto" for a
    generator that has one, else DEFAULT_STEPS. ValueError for what is none of these or out of range.
    """
    if isinstance(steps, Tensor):
        return steps.to(pooled.device)
    length = generator.grid[0] * generator.grid[1]
    if steps in (None, "auto") and generator.step_policy:
        own = {name: value.to(pooled.device) for name, value in generator.step_policy.items()}
        return own["choices"][step_log_probs(own["bias"], own["weight"], pooled).argmax(-1)]
    if steps == "auto":
        raise ValueError("`steps` auto is for a model that was trained with a range of steps: give a number")
    try:
        count = DEFAULT_STEPS if steps is None else int(steps)
    except ValueError:
        count = 0
    if not 1 <= count <= length:
        raise ValueError(f"`steps` must be 1 to {length}, or auto, got {steps!r}")
    return torch.full((len(pooled),), count, device=pooled.device)


def sample_names(prompts: Iterable[str]) -> list[str]:
    """What names the noise of each sample: its prompt, and its number among those of that prompt."""
    seen = Counter[str]()
    names = []
    for prompt in prompts:
        names.append(f"{seen[prompt]},{prompt}")
        seen[prompt] += 1
    return names


@torch.inference_mode()
def draw(
    generator: Generator,
    prompts: Sequence[str],
    *,
    steps: int | str | Tensor | None = None,
    sampler: Sampler | None = None,
    scalars: Scalars | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, L] of B prompts, `batch` at a time, by default `fitting_batch`, and the steps taken int64 [B].

    `steps` as of `step_counts`. `sampler` None is the generator's own; guidance leads away from its negative prompt.
    `scalars` are factors for each sample in place of the sampler's. An image depends on its prompt, the seed and its
    number among those of that prompt, not on the other prompts; `names` name the noise otherwise. ValueError for no
    prompts, a string in place of a list, and for what is out of range.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list of texts, like [{prompts[:40]!r}], not one text")
    batch, sampler = fitting_batch(generator) if batch is None else batch, sampler or generator.sampler
    whole = make_policy(generator, prompts, guidance=sampler.guidance)
    counts, names = step_counts(generator, whole.prompts.pooled, steps), names or sample_names(prompts)
    length, device, tokens = generator.grid[0] * generator.grid[1], counts.device, []
    codes = generator.codes if sampler.shared_noise else 0
    for index in torch.arange(len(prompts), device=device).split(batch):
        named = [names[i] for i in index.tolist()]
        noise = draw_noise(len(index), int(counts[index].max()), length, seed=seed, device=device, names=named,
                           codes=codes)
        own = None if scalars is None else Scalars(*(part.to(device)[index] for part in scalars))
        tokens.append(rollout(whole[index], counts[index], noise, sampler, scalars=own).tokens)
    return torch.cat(tokens), counts


def sample(generator: Generator, prompts: Sequence[str], **options: Any) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of B prompts. `options` are those of `draw`."""
    return decode(generator, draw(generator, prompts, **options)[0])


def search_sampler(
    generator: Generator,
    prompts: Sequence[str],
    quality: Quality,
    choices: Tensor,
    *,
    sampler: Sampler | None = None,
    rounds: int = 64,
    groups: int = 5,
    group_size: int = 8,
    seed: int = 0,
) -> Sampler:
    """Searches the sampler's scalars for the step counts `choices`, int64 [K], on the given prompts, without training.

    Each round draws `group_size` images of `groups` prompts, the counts in turn, each with its own scalars, and moves
    the scalars along the gradient of the expected quality (`method.search`). Pairs of images start from the same noise
    and try opposite scalars. It starts from the scalars of `sampler`, by default the generator's -> the sampler with
    those that were found.
    """
    sampler = sampler or generator.sampler
    search, random = new_search(sampler.scalars), torch.Generator().manual_seed(seed)
    for number in range(rounds):
        picked = torch.randint(len(prompts), (groups,), generator=random).tolist()
        texts = [prompts[i] for i in picked for _ in range(group_size)]
        # a group shares its count, so that its images compare
        counts = choices[(torch.arange(groups) + number) % len(choices)].repeat_interleave(group_size)
        scalars, tried = perturbed(search, counts, seed=seed, round=number)
        names = [f"search,{number},{i // 2}" for i in range(len(texts))]
        images = sample(generator, texts, steps=counts, sampler=sampler, scalars=scalars, seed=seed, names=names,
                        batch=len(texts))
        advantages = group_advantages(quality(images, texts).view(groups, -1), std="none").flatten()
        search = updated(search, counts, tried, advantages)
    return sampler.replace(scalars=search.table)


def quality_gap(
    generator: Generator,
    prompts: Sequence[str],
    quality: Quality,
    most: int,
    *,
    sampler: Sampler | None = None,
    count: int = 32,
    seed: int = 0,
) -> float:
    """The generator's mean quality at its most steps less that at one, over `count` prompts and equal noise.

    It is the unit of `steps_reward`. Where quality does not rise with the steps by more than two standard errors it is
    the standard deviation of the quality, and 1 where that is 0 too.
    """
    texts = (list(prompts[:count]) * count)[:count]
    names = [str(i) for i in range(count)]

    def at(steps: int) -> Tensor:
        return quality(sample(generator, texts, steps=steps, sampler=sampler, seed=seed, names=names), texts).float()

    many, one = at(most), at(1)
    gains = many - one
    rises = gains.mean() > 2 * gains.std() / count**0.5
    return gains.mean().item() if rises else many.std(correction=0).item() or 1.0
