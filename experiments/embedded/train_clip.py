"""The embedded model's quality reward: a small CLIP, trained on composed images and their captions.

It must see the right concept, what the caption says of it, and what few-step sampling does wrong: patches of several
designs and grounds in one image. So half of its images went through the tokenizer's decoder, whose texture is not to
be held against the generator, and every caption must also prefer its image to that image with patches of others in
it. It is saved in open_clip's layout and shares nothing with the generator's text encoder.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from experiments.embedded import compose
from experiments.embedded.compose import PLACES, Composition
from experiments.embedded.train_base import train_tokenizer
from experiments.embedded.train_vq import PATCH, images_of, load_tokens, load_vqmodel, tokens_of
from speedrl.rewards.scorers import clip_encoders
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import import_torchvision

WORDS = 16
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": compose.SIDE, "layers": [1, 2, 2, 2], "width": 16},
    "text_cfg": {
        "context_length": WORDS, "width": 128, "heads": 2, "layers": 2,
        "hf_tokenizer_name": ".",  # open_clip reads the tokenizer beside the weights, whatever the name
        "pool_type": "argmax",  # the end of the text has the highest id; the padding, the same id, comes after it
    },
}
PREPROCESS = {"size": compose.SIDE, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


def facts(content: Composition) -> list[int]:
    """What a caption may say of an image: thing, style, colour, size, place."""
    colour, place = list(compose.COLOURS).index(content.colour), PLACES.index(compose.place_words(content))
    return [content.thing, content.style, colour, int(content.size == compose.BIG), place]


def said(caption: str, names: list[str]) -> list[int]:
    """What a caption of `compose.caption` says, in the order of `facts`; -1 for what it leaves open."""
    text = caption.split(",")[0]  # tags follow the comma
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = rf"(?<![\w-])(?:{longest_first})(?![\w-])"
    (thing,) = (names.index(name) for name in re.findall(pattern, text))
    rest = re.sub(pattern, "_", text)
    ground = re.search(r" on a (\w+) background$", rest)
    rest = rest[: ground.start()] if ground else rest
    place = [i for i, words in enumerate(PLACES) if words and rest.endswith(words)]
    style = [i for i, word in enumerate(compose.STYLES) if word in rest.split()]
    size = [i for i, word in enumerate(("small", "big")) if word in rest.split()]
    colour = [list(compose.COLOURS).index(ground[1])] if ground else []
    return [thing, *(found[0] if found else -1 for found in (style, colour, size, place))]


def holds(said: Tensor, facts: Tensor) -> Tensor:
    """Whether a caption is true of an image: int64 [T, 5] and [N, 5] -> bool [T, N]."""
    said, facts = said[:, None], facts[None]
    return ((said == facts) | (said < 0)).all(-1)


def siblings(facts: Tensor, chosen: Tensor) -> Tensor:
    """For each of the images `chosen`, another (or the same) whose first thing is the same: int64 [B] -> [B]."""
    order = facts[:, 0].argsort()
    count = torch.bincount(facts[:, 0])
    start = count.cumsum(0) - count
    thing = facts[chosen, 0]
    return order[start[thing] + (torch.rand(len(chosen)) * count[thing]).long()]


def cut(images: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] -> its patches, uint8 [N, 256, 48]."""
    return rearrange(images, "n (h p) (w q) c -> n (h w) (p q c)", p=PATCH, q=PATCH)


def join(cells: Tensor) -> Tensor:
    """The inverse of `cut`."""
    return rearrange(cells, "n (h w) (p q c) -> n (h p) (w q) c", h=compose.SIDE // PATCH, p=PATCH, q=PATCH)


def mixed(tokens: Tensor, donors: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches of which donor a mixture takes, as few-step sampling mixes what the prompt leaves open.

    tokens int64 [N, 256], donors int64 [N, K, 256], share float [N] -> (mask bool [N, 256], donor int64 [N, 256]).
    Only patches that differ are replaced, so the share may fall short. Half of the mixtures take scattered patches,
    half take whole regions.
    """
    count, side = len(tokens), compose.SIDE // PATCH
    donor = torch.randint(donors.shape[1], tokens.shape)
    differs = donors.gather(1, donor[:, None]).squeeze(1) != tokens
    regions = F.interpolate(torch.rand(count, 1, 4, 4), size=(side, side), mode="bilinear").flatten(1)
    scattered = torch.rand(count, side * side)
    score = torch.where(torch.rand(count, 1) < 0.5, regions + 0.1 * scattered, scattered).masked_fill(~differs, -1)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return differs & (rank < share[:, None] * tokens.shape[1]), donor


def corrupted(
    images: Tensor, tokens: Tensor, facts: Tensor, grounds: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Each image with a share between `low` and `high` of its patches replaced by those of others.

    uint8 [N, 64, 64, 3], int64 [N, 256], int64 [N, 5], and the tokens of the empty grounds, int64 [colours, 256] -> the
    mixtures and their tokens, shaped as the first two. The donors are mostly two images of the same thing, else any two
    images, or an empty ground.
    """
    count, places = tokens.shape
    cells, tokens = cut(torch.cat([images, ground_images()])), torch.cat([tokens, grounds])
    chosen = torch.arange(count)
    same = torch.stack([siblings(facts, chosen), siblings(facts, chosen)], 1)
    other = torch.randint(count, (count, 2))
    ground = count + torch.randint(len(grounds), (count, 1)).expand(-1, 2)
    kind = torch.rand(count, 1)
    donors = torch.where(kind < 0.7, same, torch.where(kind < 0.85, other, ground))
    mask, donor = mixed(tokens[:count], tokens[donors], torch.empty(count).uniform_(low, high))
    source = donors.gather(1, donor)  # [N, 256]
    mixture = torch.where(mask[..., None], cells[source, torch.arange(places)], cells[:count])
    return join(mixture), torch.where(mask, tokens[source, torch.arange(places)], tokens[:count])


def ground_images() -> Tensor:
    """The empty grounds: uint8 [colours, 64, 64, 3]."""
    colours = torch.tensor(list(compose.COLOURS.values()), dtype=torch.uint8)
    return colours[:, None, None].expand(-1, compose.SIDE, compose.SIDE, -1).contiguous()


def prepare(
    sprites: np.ndarray, names: list[str], tags: list[list[str]], vq: Path, out: Path,
    *, images: int, captions: int, seed: int,
) -> dict[str, Tensor]:
    """The training set, kept in `out/images.pt` until the training is over. The first half of it is decoded.

    images, twins: uint8 [N, 64, 64, 3]; facts int64 [N, 5]; ids int64 [N, captions, WORDS]; said int64
    [N, captions, 5]. Trains the tokenizer of texts into `out`.
    """
    from transformers import CLIPTokenizer

    kept = out / "images.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    drawn = [compose.draw(rng, concepts=len(names)) for _ in range(images)]
    texts = [[compose.caption(content, names, tags, rng) for _ in range(captions)] for content in drawn]
    flat = [text for of_one in texts for text in of_one]
    train_tokenizer(flat, out)
    ids = CLIPTokenizer.from_pretrained(out)(
        flat, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
    ).input_ids
    clean = torch.from_numpy(np.stack([compose.paint(content, sprites) for content in track(drawn, "reward: images")]))
    table = torch.tensor([facts(content) for content in drawn])
    tokenizer, decoder, half = load_tokens(vq), load_vqmodel(vq), images // 2
    tokens, grounds = tokens_of(tokenizer, clean), tokens_of(tokenizer, ground_images())
    twins, twin_tokens = corrupted(clean, tokens, table, grounds, low=0.1, high=0.6)
    clean[:half] = images_of(decoder, tokens[:half])
    twins[:half] = images_of(decoder, twin_tokens[:half])
    values = {
        "images": clean, "twins": twins, "facts": table, "ids": ids.view(images, captions, -1),
        "said": torch.tensor([said(text, names) for text in flat]).view(images, captions, -1),
    }
    write_atomically(kept, lambda partial: torch.save(values, partial))
    return values


def augmented(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in about [-1, 1], so that no single pixel or shade is worth much.

    Half are moved by up to 4 pixels (the others keep the generator's patch grid), all change a little in colour, a
    quarter each is blurred or has noise.
    """
    count, side = len(images), compose.SIDE
    x = rearrange(images.float() / 127.5 - 1, "b h w c -> b c h w")
    moved = torch.randint(-4, 5, (2, count)) * (torch.rand(count) < 0.5)
    rows, columns = ((torch.arange(side) + by[:, None]).clamp(0, side - 1) for by in moved)
    x = x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    x = x * (1 + 0.05 * torch.randn(count, 1, 1, 1)) + 0.04 * torch.randn(count, 3, 1, 1)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(soft, torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.25))
    x = x + 0.06 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.25) * torch.randn_like(x)
    return x.contiguous(memory_format=torch.channels_last)


def contrast(images: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Symmetric softmax loss over features of norm 1: images [B + K, D] of which K are twins, text [B, D], true [B, B].

    A caption chooses among all images, twins too; an image among the captions. Pairs that happen to be true as
    well are left out.
    """
    count = len(text)
    also = true & ~torch.eye(count, dtype=torch.bool)
    logits = scale * text @ images.T
    clean = logits[:, :count].masked_fill(also, -torch.inf)
    target = torch.arange(count)
    to_image = F.cross_entropy(torch.cat([clean, logits[:, count:]], 1), target)
    return (to_image + F.cross_entropy(clean.T, target)) / 2


def naming(features: Tensor, prototypes: list[Tensor], scale: Tensor, facts: Tensor) -> Tensor:
    """Softmax losses of naming everything that is shown or said, summed over the columns of `facts`.

    features [B, D] of norm 1, one table of prototypes [choices, D] for each column of facts int64 [B, 6], where -1 is
    left out.
    """
    total = features.new_zeros(())
    for table, choice in zip(prototypes, facts.T, strict=True):
        logits = scale * features @ F.normalize(table, dim=-1).T
        loss = F.cross_entropy(logits, choice, ignore_index=-1, reduction="sum")
        total = total + loss / (choice >= 0).sum().clamp(min=1)  # a batch may leave one open in all its captions
    return total


def save(model: torch.nn.Module, config: dict, out: Path) -> None:
    """open_clip's local layout, weights in half precision."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": PREPROCESS})
    write_atomically(out / "open_clip_model.safetensors", lambda partial: save_file(tensors, partial))


def train(
    sprites: np.ndarray, names: list[str], tags: list[list[str]], vq: Path, out: Path,
    *, steps: int = 2400, batch: int = 64, images: int = 12_000, captions: int = 4, lr: float = 2e-3,
    decay: float = 0.05, naming_weight: float = 0.25, seed: int = 0, save_every: int = 200,
) -> None:
    """Trains for `steps` updates with AdamW, warmed up and then on a cosine, and saves the reward to `out`.

    Half of a batch are images of the same things as the other half, so that what else captions say matters; half of
    it also has its corrupted twin. Resumes from `out/state.pt`; does nothing where the weights are saved already.
    """
    import_torchvision()
    from open_clip.model import CLIP
    from transformers import CLIPTokenizer

    if (out / "open_clip_model.safetensors").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    data = prepare(sprites, names, tags, vq, out, images=images, captions=captions, seed=seed)
    torch.manual_seed(seed)
    vocabulary = len(CLIPTokenizer.from_pretrained(out))
    config = MODEL | {"text_cfg": MODEL["text_cfg"] | {"vocab_size": vocabulary}}
    model = CLIP(**config).train().to(memory_format=torch.channels_last)
    # both towers also name what is there, by prototypes that are thrown away: the contrast alone learns colours for
    # the first quarter of the training and nothing else
    prototypes = [
        torch.nn.Parameter(torch.randn(choices, config["embed_dim"]))
        for choices in (len(names), len(compose.STYLES), len(compose.COLOURS), 2, len(PLACES))
    ]
    learned = [*model.parameters(), *prototypes]
    plain = [p for p in learned if p.ndim < 2]
    matrices = [p for p in learned if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    first, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for table, value in zip(prototypes, saved["prototypes"], strict=True):
            table.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["torch"])
        first = saved["step"]

    @torch.compile
    def objective(images: Tensor, ids: Tensor, true: Tensor, shown: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        features, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
        scale = model.logit_scale.exp()
        by_name = naming(features[:batch], prototypes, scale, shown) + naming(text, prototypes, scale, told)
        return contrast(features, text, scale, true), by_name

    recent = []
    for step in track(range(first, steps), "reward"):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        drawn = torch.randint(len(data["images"]), (batch // 2,))
        chosen = torch.cat([drawn, siblings(data["facts"], drawn)])
        which = torch.randint(data["ids"].shape[1], (batch,))
        told, shown = data["said"][chosen, which], data["facts"][chosen]
        images = augmented(torch.cat([data["images"][chosen], data["twins"][drawn]]))
        loss, by_name = objective(images, data["ids"][chosen, which], holds(told, shown), shown, told)
        (loss + naming_weight * by_name).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        recent.append((loss.item(), by_name.item()))
        if step % 50 == 49:
            scale = model.logit_scale.exp().item()
            losses = "contrast {:.3f} naming {:.3f}".format(*np.mean(recent, 0))
            print(f"reward {step + 1}/{steps} {losses} scale {scale:.1f}", flush=True)
            recent = []
        if step % save_every == save_every - 1 and step + 1 < steps:
            value = {"model": model.state_dict(), "prototypes": [table.detach() for table in prototypes],
                     "optimizer": optimizer.state_dict(), "step": step + 1, "torch": torch.get_rng_state()}
            write_atomically(state, lambda partial, value=value: torch.save(value, partial))
    save(model, config, out)
    state.unlink(missing_ok=True)
    (out / "images.pt").unlink()


def report(
    sprites: np.ndarray, names: list[str], tags: list[list[str]], vq: Path, folder: Path,
    *, images: int = 3, seed: int = 1,
) -> dict:
    """What the reward in `folder` sees, on fresh images, `images` of each concept, real and decoded.

    Retrieval of the concept's name among all ("r1"); whether, of captions that differ in one word, it prefers the
    true one (colour, style, size, place); and per corruption the mean score and the share of pairs that the clean
    image wins, scored by its own caption.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    drawn = []
    for thing in range(len(names)):
        drawn += [compose.draw(rng, concepts=len(names))._replace(thing=thing) for _ in range(images)]
    texts = [compose.caption(content, names, tags, rng) for content in drawn]
    clean = torch.from_numpy(np.stack([compose.paint(content, sprites) for content in drawn]))
    table = torch.tensor([facts(content) for content in drawn])
    encode_images, encode_prompts = clip_encoders(f"local-dir:{folder}")

    def features(images: Tensor) -> Tensor:
        return torch.cat([encode_images(part.permute(0, 3, 1, 2) / 255) for part in images.split(128)])

    def article(words: str) -> str:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    captioned, named = encode_prompts(texts), encode_prompts([article(name) for name in names])
    tokenizer, decoder = load_tokens(vq), load_vqmodel(vq)
    tokens, grounds = tokens_of(tokenizer, clean), tokens_of(tokenizer, ground_images())
    mixtures = {share: corrupted(clean, tokens, table, grounds, low=share, high=share) for share in (0.1, 0.3, 0.6)}
    found = {}
    for domain in ("real", "decoded"):
        show = (lambda pixels, _: pixels) if domain == "real" else (lambda _, codes: images_of(decoder, codes))
        base = show(clean, tokens)
        shown = features(base)
        result = {"r1": ((shown @ named.T).argmax(-1) == table[:, 0]).float().mean().item()}
        for column, label, words in (
            (1, "style", [f"a {style} {{}}" for style in compose.STYLES]),
            (2, "colour", [f"a {{}} on a {colour} background" for colour in compose.COLOURS]),
            (3, "size", ["a small {}", "a big {}"]),
            (4, "place", [f"a {{}} {place}" for place in PLACES[1:]]),
        ):
            rows = torch.arange(len(table)) if column != 4 else torch.nonzero(table[:, 4])[:, 0]
            prompts = [word.format(names[table[row, 0]]) for row in rows for word in words]
            scores = (shown[rows, None] * encode_prompts(prompts).view(len(rows), len(words), -1)).sum(-1)
            result[label] = (scores.argmax(-1) == table[rows, column] - int(column == 4)).float().mean().item()
        own = (shown * captioned).sum(-1)
        result |= {"clean": own.mean().item(), "std": own.std().item()}
        wrong = (shown * named[torch.randint(len(names), (len(shown),))]).sum(-1)
        result["another concept"] = wrong.mean().item()
        worse = {f"mixed {share:.0%}": show(*mixtures[share]) for share in mixtures}
        pixels = base.permute(0, 3, 1, 2).float()
        for sigma in (1, 2):
            kernel = torch.exp(-(torch.arange(-6, 7) ** 2) / (2 * sigma**2))
            kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, -1, -1)
            soft = F.conv2d(F.pad(pixels, (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
            worse[f"blur {sigma}"] = soft.permute(0, 2, 3, 1)
        for sigma in (10, 25, 50):
            noisy = pixels + sigma * torch.randn_like(pixels)
            worse[f"noise {sigma}"] = noisy.clamp(0, 255).permute(0, 2, 3, 1)
        for label, value in worse.items():
            score = (features(value) * captioned).sum(-1)
            differs = (value != base).flatten(1).any(1)  # a donor may be the image itself
            wins = (own > score)[differs].float().mean().item()
            result[label] = {"mean": score[differs].mean().item(), "clean wins": wins}
        found[domain] = result
    return found
