"""The judge's files and the prompt lists: prototypes of other designers' emoji, real pictures' statistics, prompts.

Prototypes come from Twemoji, OpenMoji and EmojiOne, composed as the training pictures are; what counts as real are
pictures of the training designs that the evaluation prompts could mean.
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
from speedrl.evaluation import judging as judge
from speedrl.system.files import write_atomically, write_json

PIXELS = 16  # side of the thumbnails of the baseline that compares raw pixels


def draw_of(
    rng: np.random.Generator, thing: int, *, style: int, size: int, colour: str | None = None
) -> compose.Picture:
    """One thing of this design and size, at a random place on this colour, or on a random one."""
    x, y = (int(v) * compose.CELL for v in rng.integers(0, (compose.SIDE - size) // compose.CELL + 1, 2))
    colour = colour or str(rng.choice(list(compose.COLOURS)))
    return compose.Picture((thing,), style, colour, (size,), ((x, y),))


def stack(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def thumbnails(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> float32 [N, PIXELS * PIXELS * 3], the baseline's features."""
    return F.interpolate(images, size=(PIXELS, PIXELS), mode="area").flatten(1)


def prototypes(features: Tensor, label: Tensor, *, concepts: int) -> tuple[Tensor, Tensor]:
    """Mean [F] of all, and the normalised mean [concepts, F] of each concept's normalised features less that mean."""
    mean = features.mean(0)
    directions = F.normalize(features - mean, dim=-1)
    return mean, F.normalize(torch.stack([directions[label == i].mean(0) for i in range(concepts)]), dim=-1)


def prototype_images(table: np.ndarray, rng: np.random.Generator, *, colours: int = 2) -> tuple[Tensor, Tensor]:
    """Every design that there is, at both sizes, on `colours` grounds: pictures and the concept of each, int64 [N]."""
    found, label = [], []
    for thing, style in np.ndindex(table.shape[:2]):
        if not table[thing, style].any():
            continue
        for size in (compose.SMALL, compose.BIG):
            for _ in range(colours):
                found.append(compose.paint(draw_of(rng, thing, style=style, size=size), table))
                label.append(thing)
    return stack(found), torch.tensor(label)


def fits(picture: compose.Picture, prompt: str, name: str) -> bool:
    """Whether a caption that `compose.caption` drew for a thing of this name could be this picture's, tags aside."""
    caption = f" {prompt.split(',')[0]} ".replace(f" {name} ", " _ ", 1)
    ground = re.search(r"on a (\w+) background", caption)
    if ground and ground[1] != picture.colour:
        return False
    said = re.search(r" on the (left|right) | at the (top|bottom) ", caption)
    if said and said[0].strip() != compose.place_words(picture):
        return False
    words = caption.split("_")[0].split()
    sizes = {"small": compose.SMALL, "big": compose.BIG}
    styles = [word for word in words if word in compose.STYLES]
    return all(sizes.get(word, picture.sizes[0]) == picture.sizes[0] for word in words) and all(
        style == compose.STYLES[picture.style] for style in styles
    )


def meant(prompt: str, thing: int, name: str, rng: np.random.Generator, *, count: int) -> list[compose.Picture]:
    """`count` pictures that a one-thing prompt could mean, drawn as the training pictures are."""
    found = []
    while len(found) < count:
        picture = compose.draw(rng, concepts=1, pair=0.0)._replace(things=(thing,))
        if fits(picture, prompt, name):
            found.append(picture)
    return found


def draw_prompts(
    things: list[int], listed: list[dict], taken: set[str], rng: np.random.Generator, *, count: int, pair: float = 0.0
) -> list[str]:
    """`count` captions over `things`, each named about equally often, different from each other and from `taken`.

    A share `pair` of them is of two things. A caption names nothing but its picture's things, in its tags neither.
    """
    names, tags = [c["name"] for c in listed], [c["tags"] for c in listed]
    found, order = [], []
    while len(found) < count:
        order = order or [things[i] for i in rng.permutation(len(things))]
        drawn = compose.draw(rng, concepts=len(names), pair=pair)
        if len(drawn.things) == 1:
            drawn = drawn._replace(things=(order[-1],))
        else:
            drawn = drawn._replace(things=tuple(int(i) for i in rng.choice(things, 2, replace=False)))
        text = compose.caption(drawn, names, tags, rng)
        named = judge.concepts_in(text, names)
        if text in taken or text in found or not named or not set(named) <= {names[i] for i in drawn.things}:
            continue
        found.append(text)
        if len(drawn.things) == 1:
            order.pop()
    return found


def recall_by_vendor(
    network: nn.Module, mean: Tensor, centres: Tensor, pixel_mean: Tensor, pixel_centres: Tensor, table: np.ndarray,
    names: list[str], rng: np.random.Generator,
) -> dict:  # fmt: skip
    """R@1 and R@5 of real composed pictures per training vendor and size, and R@1 by 16x16 raw pixels."""
    found, concepts = {}, [(name,) for name in names]
    for style, vendor in enumerate(data.TRAIN_VENDORS):
        for size in (compose.SMALL, compose.BIG):
            drawn = [draw_of(rng, thing, style=style, size=size) for thing in range(len(names))]
            images = stack([compose.paint(picture, table) for picture in drawn])
            scores = (judge.network_features(network, images) - mean) @ centres.T
            first, five = judge.nearest_hits(scores, concepts, names)
            pixels, _ = judge.nearest_hits((thumbnails(images) - pixel_mean) @ pixel_centres.T, concepts, names)
            hits = {"r1": first, "r5": five, "pixels_r1": pixels}
            found[f"{vendor} {size}"] = {key: float(hit.float().mean()) for key, hit in hits.items()}
    return found


def build(packages: Path, cache: Path, out: Path, *, seed: int = 0, real: int = 12, count: int = 4) -> dict:
    """Writes out/judge/judge.{json,safetensors} and out/prompts/{train,eval,held_out}.txt; returns judge.json's table.

    `packages` holds what data.fetch unpacked, `cache` the rendered sprites. Statistics of real pictures take `real`
    for each evaluation prompt; what real pictures reach is measured on `count` others, as generated ones are.
    ValueError where the cached sprites are of another list of concepts.
    """
    listed, table = data.sprites(packages, data.TRAIN_VENDORS, cache / "train.npz")
    _, other = data.sprites(packages, data.JUDGE_VENDORS, cache / "judge.npz")
    if not len(listed) == len(table) == len(other):
        raise ValueError(f"the sprites in {cache} are of another list of concepts: delete them and run again")
    names = [concept["name"] for concept in listed]
    held_out = data.held_out(names)
    seen = [i for i, name in enumerate(names) if name not in held_out]
    unseen = [i for i, name in enumerate(names) if name in held_out]

    rng = np.random.default_rng(seed)
    prompts = {"seen": draw_prompts(seen, listed, set(), rng, count=60)}
    prompts["held-out"] = draw_prompts(unseen, listed, set(), rng, count=60)
    training = draw_prompts(seen, listed, set(prompts["seen"]), rng, count=640, pair=compose.PAIR)

    network = judge.load_network()

    def featured(images: Tensor, label: str) -> Tensor:
        return torch.cat([judge.network_features(network, part) for part in track(images.split(128), label)])

    images, label = prototype_images(other, rng)
    mean, centres = prototypes(featured(images, "prototypes"), label, concepts=len(names))
    pixel_mean, pixel_centres = prototypes(thumbnails(images), label, concepts=len(names))
    by_vendor = recall_by_vendor(network, mean, centres, pixel_mean, pixel_centres, table, names, rng)

    def real_pictures(which: str, number: int) -> Tensor:
        pictures = []
        for prompt in prompts[which]:
            (name,) = judge.concepts_in(prompt, names)
            pictures += meant(prompt, names.index(name), name, rng, count=number)
        return stack([compose.paint(picture, table) for picture in pictures])

    features = {which: featured(real_pictures(which, real), f"real pictures, {which}") for which in prompts}
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
    )  # fmt: skip
    reached = {}
    for which, lines in prompts.items():
        # as many pictures as an evaluation makes by default: the distance depends on their number
        images = real_pictures(which, count).unflatten(0, (len(lines), count))
        values = featured(images.flatten(0, 1), f"what real pictures reach, {which}")
        concepts = [judge.concepts_in(prompt, names) for prompt in lines for _ in range(count)]
        first, five = judge.recall(judged, values, concepts)
        grouped = values.unflatten(0, (len(images), count))
        reached[which] = {
            "judge_r1": float(first.float().mean()), "judge_r5": float(five.float().mean()),
            "frechet": judge.frechet(judged, values, prompts=which), "diversity": judge.diversity(judged, grouped),
            "pixel_diversity": judge.pixel_diversity(images),
        }  # fmt: skip
    summary = {
        "names": names,
        "held_out": sorted(held_out),
        "sets": list(prompts),
        "real": reached | {"by_vendor": by_vendor},
        "pictures": {"prototypes": len(label)} | {which: len(value) for which, value in features.items()},
        "seed": seed,
    }

    def write(partial: Path) -> None:
        save_file(tensors, partial)
        partial.chmod(0o644)  # safetensors lets nobody else read, and a package is for all

    write_atomically(out / "judge" / "judge.safetensors", write)
    write_json(out / "judge" / "judge.json", summary)
    for name, lines in (("eval", prompts["seen"]), ("held_out", prompts["held-out"]), ("train", training)):
        text = "\n".join(lines) + "\n"
        write_atomically(
            out / "prompts" / f"{name}.txt", lambda partial, text=text: partial.write_text(text, encoding="utf-8")
        )
    return summary
