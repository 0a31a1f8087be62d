"""Where the seconds of sampling go: `python -m experiments.bench.shares --steps 8` prints them as JSON."""

import json
import time
from typing import Annotated

import torch
import typer
from typer import Option

from experiments.bench.measure import seconds_of
from speedrl.cli import in_one_line
from speedrl.evaluation.figures import to_pil
from speedrl.generation import draw
from speedrl.models.generator import decode, encode_prompts
from speedrl.models.loading import load_generator
from speedrl.system.platform import quiet_allocator


def main(
    *,
    model: Annotated[str, Option(help="A model that `speedrl` loads.")] = "embedded",
    steps: Annotated[int, Option(help="Sampling steps.")] = 8,
    count: Annotated[int, Option(help="Images at a time.")] = 1,
    guidance: Annotated[float | None, Option(help="1 is none. [default: the model's]")] = None,
    repeats: Annotated[int, Option(help="Runs; their median counts.")] = 3,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the parts of an image."""
    quiet_allocator()
    began = time.perf_counter()
    generator = load_generator(model, device=device)
    load = time.perf_counter() - began
    prompts = [f"an owl, number {i}" for i in range(count)]
    sampler = {"steps": steps, "batch": count, "sampler": generator.sampler.replace(guidance=guidance)}
    tokens, _ = draw(generator, prompts, **sampler)
    how = {"device": device, "repeats": repeats}
    with torch.inference_mode():
        text = seconds_of(lambda: encode_prompts(generator, prompts), **how)
        whole = seconds_of(lambda: draw(generator, prompts, **sampler), **how)
        pixels = seconds_of(lambda: decode(generator, tokens), **how)
        images = decode(generator, tokens)
        png = seconds_of(lambda: [to_pil(image) for image in images], **how)
    total = whole + pixels + png
    shares = {"text": text, "network": whole - text, "decode": pixels, "to PIL": png}
    found = {"seconds": total / count} | {name: f"{value / total:.0%}" for name, value in shares.items()}
    print(json.dumps(found | {"load s": load}))


if __name__ == "__main__":
    typer.run(in_one_line(main))
