"""The judge's files and the prompt lists: prototypes of other designers' emoji, real images' statistics, prompts.

Prototypes come from Twemoji and EmojiOne, composed as the training images are; what counts as real are images of the
training designs that the evaluation prompts could mean.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.embedded import compose, data
from experiments.embedded.compose import Composition
from speedrl.evaluation import judging as judge
from speedrl.system.files import write_atomically, write_json

PIXELS = 16  # side of the thumbnails of the baseline that compares raw pixels


def draw_of(rng: np.random.Generator, thing: int, *, style: int, size: int, colour: str) -> Composition:
    """One thing of this design and size on this ground, at a random place."""
    places = compose.places(size)
    return Composition(thing, style, colour, size, places[int(rng.integers(len(places)))])


def stack(images: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def thumbnails(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> float32 [N, PIXELS * PIXELS * 3], the baseline's features."""
    return F.interpolate(images, size=(PIXELS, PIXELS), mode="area").flatten(1)


def prototypes(features: Tensor, label: Tensor, *, concepts: int) -> tuple[Tensor, Tensor]:
    """Mean [F] of all, and the normalised mean [concepts, F] of each concept's normalised features less that mean."""
    mean = features.mean(0)
    directions = F.normalize(features - mean, dim=-1)
    return mean, F.normalize(torch.stack([directions[label == i].mean(0) for i in range(concepts)]), dim=-1)


def prototype_images(sprites: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every design in both sizes on every ground: float32 [N, 3, 64, 64] and the concept of each, int64 [N]."""
    drawn = [
        draw_of(rng, thing, style=style, size=size, colour=colour)
        for thing, style in np.ndindex(sprites.shape[:2])
        for size in (compose.SMALL, compose.BIG)
        for colour in compose.COLOURS
    ]
    return stack([compose.paint(content, sprites) for content in drawn]), torch.tensor([c.thing for c in drawn])


def fits(content: Composition, prompt: str, name: str) -> bool:
    """Whether a caption that `compose.caption` drew for a thing of this name could be this image's, tags aside."""
    caption = f" {prompt.split(',')[0]} ".replace(f" {name} ", " _ ", 1)
    ground = re.search(r"on a (\w+) background", caption)
    if ground and ground[1] != content.colour:
        return False
    said = re.search(r" on the (left|right) | at the (top|bottom) ", caption)
    if said and said[0].strip() != compose.place_words(content):
        return False
    words = caption.split("_")[0].split()
    sizes = {"small": compose.SMALL, "big": compose.BIG}
    styles = [word for word in words if word in compose.STYLES]
    return all(sizes.get(word, content.size) == content.size for word in words) and all(
        style == compose.STYLES[content.style] for style in styles
    )


def meant(prompt: str, thing: int, name: str, rng: np.random.Generator, *, count: int) -> list[Composition]:
    """`count` images that a prompt could mean, drawn as the training images are."""
    found = []
    while len(found) < count:
        content = compose.draw(rng, concepts=1)._replace(thing=thing)
        if fits(content, prompt, name):
            found.append(content)
    return found


def draw_prompts(
    things: list[int], listed: list[dict], taken: set[str], rng: np.random.Generator, *, count: int
) -> list[str]:
    """`count` captions over `things`, each named about equally often, different from each other and from `taken`.

    A caption names nothing but its thing, in its tags neither.
    """
    names, tags = [c["name"] for c in listed], [c["tags"] for c in listed]
    found, order = [], []
    while len(found) < count:
        order = order or [things[i] for i in rng.permutation(len(things))]
        content = compose.draw(rng, concepts=len(names))._replace(thing=order[-1])
        text = compose.caption(content, names, tags, rng)
        if text not in taken and text not in found and judge.concepts_in(text, names) == (names[order[-1]],):
            found.append(text)
            order.pop()
    return found


def recall_by_vendor(
    network: nn.Module, mean: Tensor, centres: Tensor, pixel_mean: Tensor, pixel_centres: Tensor, sprites: np.ndarray,
    names: list[str], rng: np.random.Generator,
) -> dict:
    """R@1 and R@5 of real composed images per training vendor and size, and R@1 by 16x16 raw pixels."""
    found, concepts, colours = {}, [(name,) for name in names], list(compose.COLOURS)
    for style, vendor in enumerate(data.TRAIN_VENDORS):
        for size in (compose.SMALL, compose.BIG):
            drawn = [
                draw_of(rng, thing, style=style, size=size, colour=colours[int(rng.integers(len(colours)))])
                for thing in range(len(names))
            ]
            images = stack([compose.paint(content, sprites) for content in drawn])
            scores = (judge.network_features(network, images) - mean) @ centres.T
            first, five = judge.nearest_hits(scores, concepts, names)
            pixels, _ = judge.nearest_hits((thumbnails(images) - pixel_mean) @ pixel_centres.T, concepts, names)
            hits = {"r1": first, "r5": five, "pixels_r1": pixels}
            found[f"{vendor} {size}"] = {key: float(hit.float().mean()) for key, hit in hits.items()}
    return found


def build(
    listed: list[dict], sprites: np.ndarray, other: np.ndarray, out: Path,
    *, seed: int = 0, real: int = 12, count: int = 4, evaluated: int = 150, training: int = 640,
) -> dict:
    """Writes out/judge/judge.{json,safetensors} and out/prompts/{train,eval,held_out}.txt; returns judge.json's table.

    `sprites` are the training vendors' designs of the concepts `listed`, `other` the judge's. There are `evaluated`
    prompts each of training and of held-out concepts. Statistics of real images take `real` images of each of these;
    what real images reach is measured on `count` others, as generated ones are.
    """
    names = [concept["name"] for concept in listed]
    held_out = data.held_out(names)
    things = {
        "seen": [i for i, name in enumerate(names) if name not in held_out],
        "held-out": [i for i, name in enumerate(names) if name in held_out],
    }
    rng = np.random.default_rng(seed)
    prompts = {which: draw_prompts(of, listed, set(), rng, count=evaluated) for which, of in things.items()}
    for_training = draw_prompts(things["seen"], listed, set(prompts["seen"]), rng, count=training)

    network = judge.load_network()

    def featured(images: Tensor, label: str) -> Tensor:
        return torch.cat([judge.network_features(network, part) for part in track(images.split(128), label)])

    images, label = prototype_images(other, rng)
    mean, centres = prototypes(featured(images, "judge: prototypes"), label, concepts=len(names))
    pixel_mean, pixel_centres = prototypes(thumbnails(images), label, concepts=len(names))
    by_vendor = recall_by_vendor(network, mean, centres, pixel_mean, pixel_centres, sprites, names, rng)

    def real_images(which: str, number: int) -> Tensor:
        drawn = []
        for prompt in prompts[which]:
            (name,) = judge.concepts_in(prompt, names)
            drawn += meant(prompt, names.index(name), name, rng, count=number)
        return stack([compose.paint(content, sprites) for content in drawn])

    features = {which: featured(real_images(which, real), f"judge: real images, {which}") for which in prompts}
    everything = torch.cat(list(features.values())) - mean
    axes = torch.linalg.eigh(everything.double().T.cov()).eigenvectors[:, -32:].flip(1).float().contiguous()
    along = {which: judge.project(value, mean, axes) for which, value in features.items()}
    tensors = {
        "mean": mean,
        "prototypes": centres.half(),
        "axes": axes,
        "real_mean": torch.stack([value.mean(0) for value in along.values()]).float(),
        "real_cov": torch.stack([value.T.cov() for value in along.values()]).float(),
    }
    judged = judge.Judge(
        network, names, frozenset(held_out), mean, centres, axes,
        dict(zip(prompts, tensors["real_mean"], strict=True)), dict(zip(prompts, tensors["real_cov"], strict=True)), {},
    )
    reached = {}
    for which, lines in prompts.items():
        # as many images as an evaluation makes by default: the distance depends on their number
        images = real_images(which, count).unflatten(0, (len(lines), count))
        values = featured(images.flatten(0, 1), f"judge: what real images reach, {which}")
        concepts = [judge.concepts_in(prompt, names) for prompt in lines for _ in range(count)]
        first, five = judge.recall(judged, values, concepts)
        grouped = values.unflatten(0, (len(images), count))
        reached[which] = {
            "judge_r1": float(first.float().mean()), "judge_r5": float(five.float().mean()),
            "frechet": judge.frechet(judged, values, prompts=which), "diversity": judge.diversity(judged, grouped),
            "pixel_diversity": judge.pixel_diversity(images),
        }
    summary = {
        "names": names,
        "held_out": sorted(held_out),
        "sets": list(prompts),
        "real": reached | {"by_vendor": by_vendor},
        "images": {"prototypes": len(label)} | {which: len(value) for which, value in features.items()},
        "seed": seed,
    }

    def write(partial: Path) -> None:
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors lets nobody else read, and a package is for all

    write_atomically(out / "judge" / "judge.safetensors", write)
    write_json(out / "judge" / "judge.json", summary)
    for name, lines in (("eval", prompts["seen"]), ("held_out", prompts["held-out"]), ("train", for_training)):
        text = "\n".join(lines) + "\n"
        write_atomically(
            out / "prompts" / f"{name}.txt", lambda partial, text=text: partial.write_text(text, encoding="utf-8")
        )
    return summary
