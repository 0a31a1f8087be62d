"""Images from prompts."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from speedrl.method.sampling import Noise, draw_noise, rollout
from speedrl.method.search import scalars_at
from speedrl.method.steps import step_log_probs
from speedrl.models.generator import Generator, decode, fitting_batch
from speedrl.models.loading import check_guidance
from speedrl.policies import Policy, from_random, make_policy

DEFAULT_STEPS = 8  # of a model without a step policy


def step_counts(generator: Generator, policy: Policy, steps: int | str | None) -> Tensor:
    """The number of steps of each of the policy's prompts, int64 [B]: as given, or the most likely of the step policy.

    None and "auto" are the step policy's choice; without one, None is DEFAULT_STEPS and "auto" a ValueError.
    """
    batch, length, pooled = len(policy.prompts.pooled), generator.grid[0] * generator.grid[1], policy.prompts.pooled
    if steps in (None, "auto") and "steps.bias" in generator.sampler:
        own = {name: value.to(pooled.device) for name, value in generator.sampler.items()}
        modes = step_log_probs(own["steps.bias"], own["steps.weight"], pooled).argmax(-1)
        return own["steps.choices"][modes]
    if steps == "auto":
        raise ValueError("--steps auto is for a model that was trained with a range of steps: give a number")
    try:
        count = DEFAULT_STEPS if steps is None else int(steps)
    except ValueError:
        count = 0
    if not 1 <= count <= length:
        raise ValueError(f"--steps must be 1 to {length}, or auto, got {steps!r}")
    return torch.full((batch,), count, device=pooled.device)


@torch.inference_mode()
def draw(
    generator: Generator,
    prompts: list[str],
    *,
    steps: int | str | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    schedule: str | None = None,
    order: str | None = None,
    remask: float | None = None,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, L] of B prompts, `batch` at a time, by default `fitting_batch`, and the steps taken int64 [B].

    `steps` is their number, or None or "auto" for the number that the model's step policy finds most likely for each
    prompt (`step_counts`). Guidance, temperature, mask schedule, reveal order and the share to `remask` None are the
    generator's own, to which its searched scalars are applied; guidance leads away from its negative prompt. An
    image depends on its prompt, the seed and its number among those of that prompt, not on the other prompts.
    ValueError for no prompts, a string in place of a list, and for what is out of range.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list of texts, like [{prompts[:40]!r}], not one text")
    guidance = generator.guidance if guidance is None else check_guidance(guidance)
    temperature = generator.temperature if temperature is None else temperature
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be finite and not negative, got {temperature}")
    batch, length = fitting_batch(generator) if batch is None else batch, generator.grid[0] * generator.grid[1]
    whole = make_policy(generator, prompts, guidance=guidance)
    counts, table = step_counts(generator, whole, steps), generator.sampler.get("search")
    names, seen = [], Counter[str]()
    for prompt in prompts:
        names.append(f"{seen[prompt]},{prompt}")
        seen[prompt] += 1
    tokens = []
    for index in torch.arange(len(prompts), device=counts.device).split(batch):
        policy: Callable[..., Tensor] = whole[index]
        named = [names[i] for i in index.tolist()]
        most, device = int(counts[index].max()), counts.device
        noise = draw_noise(len(index), most, length, seed=seed, device=device, names=named)
        if generator.random_share:
            beyond = draw_noise(len(index), 1, length, seed=seed, device=device, names=[f"start,{n}" for n in named])
            beyond = Noise(*(part[:, 0] for part in beyond))
            policy = from_random(policy, beyond, share=generator.random_share, mask_id=generator.mask_id,
                                 codes=generator.codes)
        drawn = rollout(
            policy, counts[index], noise, grid=generator.grid, mask_id=generator.mask_id, temperature=temperature,
            schedule=schedule or generator.schedule, order=order or generator.order,
            remask=generator.remask if remask is None else remask, scalars=scalars_at(table, counts[index]),
        )
        tokens.append(drawn.tokens)
    return torch.cat(tokens), counts


def sample(generator: Generator, prompts: list[str], **options) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of B prompts. `options` are those of `draw`."""
    return decode(generator, draw(generator, prompts, **options)[0])
