"""Pictures from prompts, and sheets of pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from speedrl.method.likelihoods import guided
from speedrl.method.remasking import check_share, revise_tokens, revised_counts, split_steps
from speedrl.method.sampling import Noise, draw_noise, rollout
from speedrl.method.schedules import step_range
from speedrl.method.search import settled
from speedrl.models.checkpoint import (
    Generator,
    Prompts,
    decode,
    encode_prompts,
    fitting_batch,
    head_at,
    join,
    repeat,
    take,
)
from speedrl.pace import SWEEP, divided, summary, until_stop
from speedrl.system.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image


def guided_policy(
    transformer: nn.Module,
    prompts: Prompts,
    empty: Prompts,
    *,
    guidance: float,
    grid: tuple[int, int],
    summarise: bool = False,
) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """policy(tokens int64 [B, L], timestep int64 [B]) -> guided logits [B, L, codes], for `rollout` and training.

    policy(tokens [n, L], timestep [n], samples int64 [n], places int64 [n, K]) -> [n, K, codes] is that of some samples
    at some places. `prompts` of B, `empty` of 1 or B. One call of the network on [empty, prompts], twice the rows; at
    guidance 1 the empty prompt plays no part, and one call on the rows gives the network's own logits. With
    `summarise` it gives the `summary` of the prompts' features beside them, [B or n, C], from the same call.
    """
    size, times = len(prompts.text), 1 if guidance == 1 else 2
    known = prompts if times == 1 else join(repeat(empty, size // len(empty.text)), prompts)

    def policy(tokens: Tensor, timestep: Tensor, samples: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        part = known
        if samples is not None and len(samples) < size:
            part = take(known, samples if times == 1 else torch.cat([samples, samples + size]))
        where = None if places is None else places.repeat(times, 1)
        features = transformer.features(tokens.repeat(times, 1).unflatten(1, grid), timestep.repeat(times), *part)
        found = head_at(transformer, features, where)
        found = found if times == 1 else guided(*reversed(found.chunk(2)), guidance)
        # what is no code is masked
        return (found, summary(features[-len(tokens) :], tokens >= transformer.codes)) if summarise else found

    return policy


def from_random(
    policy: Callable[..., Tensor], noise: Noise, *, share: float, mask_id: int, codes: int
) -> Callable[..., Tensor]:
    """A policy that sees a `share` of random tokens in the place of masks where all is masked; `noise` of [B, L] each.

    So one-step generators are distilled (Di[M]O, arXiv 2503.15457): without it, all that could tell the pictures of a
    prompt apart is which token each position draws, and they draw independently.
    """
    few = round(share * noise.gumbel.shape[-1])
    random = noise.gumbel.argsort(-1).argsort(-1) < few
    beginning = torch.where(random, (noise.uniform * codes).long(), mask_id)

    def started(tokens: Tensor, timestep: Tensor, *part: Tensor) -> Tensor:
        nothing_known = (tokens == mask_id).all(-1, keepdim=True)
        seen = torch.where(nothing_known, beginning[part[0]] if part else beginning, tokens)
        return policy(seen, timestep, *part)

    return started


def planned(generator: Generator, steps: int | str | None) -> tuple[int, int | None]:
    """The steps that a picture is drawn in, and None; or where the policy chooses those that reveal, and how many
    sweeps it may take. ValueError for what this generator cannot do."""
    pace, length = generator.pace, generator.grid[0] * generator.grid[1]
    if steps is None:
        steps = 8 if pace is None else "auto"
    if str(steps).startswith("auto"):
        if pace is None:
            raise ValueError("this model does not choose its steps: give a number, or a model of train --steps auto")
        most = step_range(steps, at_most=pace.most).most
        revealing = divided(pace.most)[0]
        if not revealing <= most <= pace.most:
            raise ValueError(f"this model chooses from {revealing} to {pace.most} steps, not at most {most}")
        return revealing, (most - revealing) // SWEEP
    try:
        count = int(steps)
    except ValueError:
        raise ValueError(f"the number of steps must be 1 to {length} or auto, got {steps!r}") from None
    if not 1 <= count <= length:
        raise ValueError(f"the number of steps must be 1 to {length}, got {count}")
    return count, None


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
    revise: float | None = None,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, L] of B prompts, `batch` at a time, by default `fitting_batch`, and the steps taken int64 [B].

    `steps` is their number or "auto", where the model chooses ("auto:8": at most 8 of them); None is "auto" for a
    model that was trained to choose and 8 for another. Guidance, temperature, mask schedule, reveal order and the
    share to `revise` None are the generator's own, to which its tuning is applied, and guidance leads away from its
    negative prompt. The noise of sample i depends on (seed, i) alone. ValueError for no prompts, for steps outside 1
    .. L or that the model cannot choose, for an unknown schedule or order, and for a share outside 0 .. 1, or of 0
    where the model chooses.
    """
    length, (first_steps, sweeps) = generator.grid[0] * generator.grid[1], planned(generator, steps)
    chooses = sweeps is not None
    guidance = generator.guidance if guidance is None else guidance
    temperature = generator.temperature if temperature is None else temperature
    if not math.isfinite(guidance) or not 0 <= temperature < math.inf:
        wrong = f"guidance {guidance} and temperature {temperature}"
        raise ValueError(f"both must be finite, and the temperature not negative: {wrong}")
    schedule, order = schedule or generator.schedule, order or generator.order
    share = check_share(generator.revise if revise is None else revise)
    if chooses and not share:
        raise ValueError("a model that chooses its steps revises in those that it adds: give --revise above 0")
    revealing, revising = (first_steps, 0) if chooses else split_steps(first_steps, share=share)
    again = revised_counts(revising, length=length, share=share)
    most = first_steps + SWEEP * (sweeps or 0)
    batch = fitting_batch(generator) if batch is None else batch
    encoded, empty = encode_prompts(generator, prompts), encode_prompts(generator, [generator.negative])
    device = encoded.text.device
    tokens, taken = [], []
    for first in range(0, len(prompts), batch):
        part = take(encoded, torch.arange(first, min(first + batch, len(prompts)), device=device))
        size = len(part.text)
        policy = guided_policy(generator.transformer, part, empty, guidance=guidance, grid=generator.grid,
                               summarise=chooses)  # fmt: skip
        noise = draw_noise(size, most + bool(generator.random_share), length, seed=seed, first=first, device=device)
        if generator.random_share:
            beyond = Noise(noise.uniform[:, most], noise.gumbel[:, most])  # what no step uses
            policy = from_random(policy, beyond, share=generator.random_share, mask_id=generator.mask_id,
                                 codes=generator.codes)  # fmt: skip
        counts = torch.full((size,), revealing, device=device)
        tuning = None if generator.tuning is None else settled(generator.tuning, counts)
        finished = rollout(
            policy,
            counts,
            noise,
            length=length,
            mask_id=generator.mask_id,
            temperature=temperature,
            schedule=schedule,
            order=order,
            grid=generator.grid,
            sparse=True,
            summarise=chooses,
            tuning=tuning,
        )
        how = {"mask_id": generator.mask_id, "grid": generator.grid, "sharpness": tuning and tuning.last}
        if chooses:
            drawn, took = until_stop(policy, generator.pace, finished, noise.uniform, sweeps=sweeps, share=share, **how)
        else:  # with nothing to draw again that is the rollout itself
            drawn = revise_tokens(policy, finished, noise.uniform[:, revealing:], again, **how).tokens
            took = finished.steps + revising
        tokens.append(drawn)
        taken.append(took)
    return torch.cat(tokens), torch.cat(taken)


def generate(generator: Generator, prompts: list[str], **options) -> Tensor:
    """Tokens int64 [B, L] of B prompts. `options` are those of `draw`."""
    return draw(generator, prompts, **options)[0]


def sample(generator: Generator, prompts: list[str], **options) -> Tensor:
    """Pictures float32 [B, 3, H, W] in [0, 1] of B prompts. `options` are those of `draw`."""
    return decode(generator, generate(generator, prompts, **options))


def to_pil(picture: Tensor, *, scale: int = 1) -> "Image.Image":
    """A picture [3, H, W] in [0, 1] as a PIL image, every pixel `scale` x `scale`."""
    from PIL import Image

    pixels = rearrange(picture.clamp(0, 1).mul(255).round().byte().cpu(), "c h w -> h w c")
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(pixels.numpy())


def contact_sheet(
    rows: list[Tensor],
    *,
    labels: list[str] | None = None,
    titles: list[str] | None = None,
    scale: int = 1,
    gap: int = 4,
) -> "Image.Image":
    """Rows of pictures, each [n, 3, H, W] in [0, 1], on one white sheet: a PIL image.

    `labels` stand to the left of each row, `titles` above each column, both cut where they are too long; `gap` in
    pixels. Rows may differ in n.
    """
    from PIL import Image, ImageDraw, ImageFont

    labels = [label if len(label) <= 120 else label[:120] + "..." for label in labels or []]
    height, width = (side * scale for side in rows[0].shape[-2:])
    font = ImageFont.load_default(max(11, min(height, width) // 10))
    box = [font.getbbox(label) for label in labels or []]
    left = max((right for _, _, right, _ in box), default=-gap) + 2 * gap
    top = font.getbbox("Ay")[3] + 2 * gap if titles else gap
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = top + i * (height + gap)
        if labels:
            draw.text((gap, y + height // 2), labels[i], fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            sheet.paste(to_pil(picture, scale=scale), (left + j * (width + gap), y))
    for j, title in enumerate(titles or []):
        shown = title[:120]
        while shown and font.getlength(shown) > width:
            shown = shown[:-1]
        draw.text((left + j * (width + gap), gap), shown, fill="black", font=font)
    return sheet


def save_png(image: "Image.Image", path: Path) -> None:
    """Writes a PNG, making its folder: to a temporary name first, so that a file of this name is always whole."""
    write_atomically(Path(path), lambda partial: image.save(partial, format="PNG"))
