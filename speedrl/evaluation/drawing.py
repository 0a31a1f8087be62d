"""Images of prompts into a file."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from speedrl.evaluation.figures import check_suffix, contact_sheet, save_image, to_pil
from speedrl.generation import sample
from speedrl.method.sampler import ORDERS
from speedrl.models.generator import Generator, cut_prompts
from speedrl.models.loading import load_generator
from speedrl.run.shared_options import (
    Base,
    Device,
    MicroConds,
    Model,
    NegativePrompt,
    Precision,
    Size,
    TextEncoder,
)
from speedrl.system.options import SAMPLER, Opt, check_options
from speedrl.system.platform import DTYPES, pick_device


def warn_of_sampling(prompts: Sequence[str], generator: Generator, *, guidance: float, negative: str | None) -> None:
    """Warns of prompts that the text encoder cuts, and of a negative prompt that nothing leads away from."""
    if cut := cut_prompts(generator, list(dict.fromkeys(prompts))):
        print(f"warning: {cut} of the prompts are longer than the text encoder reads, and are cut", file=sys.stderr)
    if negative and guidance == 1:
        print("warning: --negative-prompt has no effect at guidance 1: give --guidance above 1", file=sys.stderr)


def sample_to_file(
    prompts: Annotated[Sequence[str], Opt("One row of images for each.", cli=list[str], positional=True)],
    *,
    steps: Annotated[str | int | None, Opt(
        "Sampling steps. Each is a network evaluation, two with guidance. auto: what the model's step policy finds "
        "most likely for the prompt. [default: auto for a model that has one, else 8]",
        flags=("--steps", "--num-inference-steps"), cli=str | None)] = None,
    count: Annotated[int, Opt("Images of each prompt.", least=1)] = 1,
    out: Annotated[str | Path, Opt("The file to write: .png, .jpg or .webp.", cli=Path)] = "sample.png",
    seed: Annotated[int, Opt("An image depends on its prompt, the seed and its number of that prompt alone.")] = 0,
    model: Model = "embedded",
    guidance: Annotated[float | None, Opt("Guidance scale; 1 is none. [default: the model's]", SAMPLER,
                                          ("--guidance", "--guidance-scale"))] = None,
    temperature: Annotated[float | None, Opt(
        "Temperature of the reveal order at the first step. [default: the model's]", SAMPLER)] = None,
    schedule: Annotated[str | None, Opt(
        "Mask schedule: cosine, linear, square, arccos or power:X. [default: the model's]", SAMPLER)] = None,
    order: Annotated[str | None, Opt("Reveal order. [default: the model's]", SAMPLER, choices=ORDERS)] = None,
    remask: Annotated[float | None, Opt(
        "Share of the tokens that the last quarter of 6 steps or more draws again. [default: the model's]",
        SAMPLER)] = None,
    shared_noise: Annotated[bool | None, Opt(
        "All positions of a step draw their tokens by the same noise, so that few steps agree. [default: the model's]",
        SAMPLER, ("--shared-noise/--no-shared-noise",))] = None,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: NegativePrompt = None,
    micro_conds: MicroConds = None,
    base: Base = None,
    precision: Precision = "fp32",
    device: Device = "auto",
) -> None:
    """Draws `count` images of each prompt and writes one image, or a contact sheet of several, to `out`."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: say what to draw")
    check_options(sample_to_file, locals())
    out = Path(out)
    check_suffix(out)
    generator = load_generator(model, device=pick_device(device), dtype=DTYPES[precision], text_encoder=text_encoder,
                               size=size, negative=negative_prompt, micro_conds=micro_conds, base=base)
    sampler = generator.sampler.replace(guidance=guidance, temperature=temperature, schedule=schedule, order=order,
                                        remask=remask, shared_noise=shared_noise)
    wanted = [prompt for prompt in prompts for _ in range(count)]
    warn_of_sampling(wanted, generator, guidance=sampler.guidance, negative=negative_prompt)
    images = sample(generator, wanted, steps=steps, seed=seed, sampler=sampler)
    scale = max(1, 256 // generator.size[0])  # small images large enough to see
    if len(images) == 1:
        save_image(to_pil(images[0], scale=scale), out)
    elif len(prompts) == 1:
        save_image(contact_sheet(list(images.split(math.ceil(count**0.5))), scale=scale), out)
    else:
        save_image(contact_sheet(list(images.split(count)), labels=prompts, scale=scale), out)
    print(f"wrote {out}")
