"""What rebuilds the embedded model: compositions, the image tokenizer, the pool of tokens, the states of training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from experiments.embedded import build_judge, card, compose, data, measure, train_base, train_clip, train_vq
from speedrl.rewards.loading import EMBEDDED

NAMES, TAGS = ["apple", "owl"], [["fruit", "red"], []]


@pytest.fixture(scope="module")
def sprites() -> np.ndarray:
    """Two things in two designs: blobs of colour with soft edges, uint8 [2, 2, 64, 64, 4]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 63 * 2 - 1
    table = np.zeros((2, 2, 64, 64, 4), np.uint8)
    for thing, style in np.ndindex(2, 2):
        table[thing, style, ..., :3] = rng.integers(40, 215, 3) + 40 * np.sin(6 * x * rng.random() + y)[..., None]
        table[thing, style, ..., 3] = 255 * np.clip(6 * (0.8 - np.hypot(x * (1 + style / 2), y)), 0, 1)
    return table


@pytest.fixture(scope="module")
def images(sprites) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([compose.paint(compose.draw(rng, concepts=2), sprites) for _ in range(24)])


@pytest.fixture(scope="module")
def vq(images, tmp_path_factory):
    """A tokenizer's folder, hardly trained."""
    folder = tmp_path_factory.mktemp("vq")
    with torch.compiler.set_stance("force_eager"):
        train_vq.train_tokens(images, folder, steps=20, batch=4)
    train_vq.train_decoder(images, folder, steps=5, batch=4)
    return folder


@pytest.fixture(scope="module")
def base(sprites, vq, tmp_path_factory):
    """A base's folder with its pool, after two updates."""
    folder = tmp_path_factory.mktemp("base")
    train_base.make_pool(sprites, NAMES, TAGS, vq, folder)
    with torch.compiler.set_stance("force_eager"):
        assert train_base.train(train_base.read_pool(folder), folder, steps=2, batch=4) == 2
    return folder


def test_things_are_large_and_inside_the_image_on_a_plain_ground(sprites):
    rng, sizes = np.random.default_rng(2), set()
    for _ in range(100):
        content = compose.draw(rng, concepts=2)
        assert min(content.place) >= 0 and max(content.place) + content.size <= compose.SIDE
        image, colour = compose.paint(content, sprites), np.array(compose.COLOURS[content.colour])
        differs = (image != colour).any(-1)
        rows, columns = np.nonzero(differs)
        x, y = content.place
        assert x <= columns.min() and columns.max() < x + content.size
        assert y <= rows.min() and rows.max() < y + content.size
        sizes.add(content.size)
    assert sizes == {compose.SMALL, compose.BIG} and compose.SMALL >= 40


def test_captions_say_only_what_is_there():
    rng = np.random.default_rng(3)
    for _ in range(300):
        content = compose.draw(rng, concepts=2)
        text = compose.caption(content, NAMES, [[], []], rng)
        words = set(text.split())
        assert content.colour in words or not words & set(compose.COLOURS)
        assert compose.STYLES[content.style] in words or not words & set(compose.STYLES)
        assert words & set(NAMES) == {NAMES[content.thing]}
        assert build_judge.fits(content, text, NAMES[content.thing])
        told = torch.tensor([train_clip.said(text, NAMES)])
        assert train_clip.holds(told, torch.tensor([train_clip.facts(content)])).all()


def test_the_codebook_follows_its_points_and_revives_dead_codes():
    torch.manual_seed(0)
    book = train_vq.Tokens(codes=4, latent=2, width=8)
    corners = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    points = corners.repeat(40, 1) + 0.1 * torch.randn(120, 2)
    book.restart(points)
    moved = points + 1
    for _ in range(400):
        book.follow(moved, train_vq.nearest(moved, book.centres))
    assert torch.cdist(moved, book.centres).amin(-1).max() < 0.6
    book.total[0], book.count[0] = book.total[0] * 0 + 99, 1e-3
    assert book.replace_dead(moved) >= 1
    assert torch.cdist(book.centres, moved).amin(-1).max() < 0.6


def test_the_tokenizer_trains_resumes_and_gives_back_images(images, vq, tmp_path):
    with torch.compiler.set_stance("force_eager"):
        train_vq.train_tokens(images, tmp_path, steps=20, batch=4)
        train_vq.train_tokens(images, tmp_path / "longer", steps=20, batch=4)
        before = train_vq.load_tokens(tmp_path / "longer").centres
        train_vq.train_tokens(images, tmp_path / "longer", steps=22, batch=4)
        after = train_vq.load_tokens(tmp_path / "longer").centres
    assert train_vq.updates(tmp_path / "longer", "tokens") == 22
    assert train_vq.effort(tmp_path / "longer", "tokens")["seconds"] > 0
    assert ((after - before).norm(dim=-1) < 0.5 * before.norm(dim=-1)).float().mean() > 0.9, "codes keep their meaning"
    pixels = torch.from_numpy(images)
    tokens = train_vq.tokens_of(train_vq.load_tokens(vq), pixels)
    assert tokens.shape == (len(images), 256) and tokens.max() < train_vq.CODES
    assert torch.equal(tokens, train_vq.tokens_of(train_vq.load_tokens(tmp_path), pixels)), "seeds are fixed"
    decoder = train_vq.load_vqmodel(vq)
    assert train_vq.images_of(decoder, tokens).shape == images.shape
    assert train_vq.updates(vq, "decoder") == 5
    shutil.copytree(vq, tmp_path / "vq")
    train_vq.train_decoder(images, tmp_path / "vq", steps=7, batch=4)
    assert train_vq.updates(tmp_path / "vq", "decoder") == 7, "a stage's decoder goes on"
    again = train_vq.load_vqmodel(tmp_path / "vq")
    assert torch.equal(again.quantize.embedding.weight, decoder.quantize.embedding.weight), "the tokens stay"


def test_a_thing_has_the_same_tokens_wherever_it_stands(sprites, vq):
    content = compose.Composition(0, 1, "blue", compose.SMALL, (0, 0))
    pixels = [compose.paint(content._replace(place=place), sprites) for place in ((8, 8), (16, 8))]
    first, second = train_vq.tokens_of(train_vq.load_tokens(vq), torch.from_numpy(np.stack(pixels))).view(2, 16, 16)
    assert torch.equal(first[:, :-2], second[:, 2:]), "two tokens to the right"


def test_the_pool_holds_every_composition_in_order(sprites, vq, base):
    pool, (placed, weight) = train_base.read_pool(base), train_base.placements()
    count = 2 * len(compose.STYLES) * len(compose.COLOURS) * len(placed)
    assert pool["tokens"].shape == (count, 256) and pool["ids"].shape[::2] == (count, train_base.WORDS)
    assert weight.sum() == pytest.approx(1)
    where = [1, 0, 3, 7]  # thing, design, ground, placement
    index = np.ravel_multi_index(where, (2, len(compose.STYLES), len(compose.COLOURS), len(placed)))
    content = compose.Composition(1, 0, list(compose.COLOURS)[3], *placed[7])
    painted = torch.from_numpy(compose.paint(content, sprites))[None]
    wanted = train_vq.tokens_of(train_vq.load_tokens(vq), painted)[0]
    assert (pool["tokens"][index] == wanted).float().mean() > 0.98, "but for rounding"


def test_the_loss_weighs_every_masked_token_once():
    torch.manual_seed(0)
    tokens = torch.randint(train_base.CODES, (64, 256))
    noisy, timestep, places, weights = train_base.corrupt(tokens)
    masked = noisy == train_base.MASK
    assert torch.equal(noisy[~masked], tokens[~masked])
    torch.testing.assert_close(weights.sum(-1), masked.sum(-1).float())
    assert (masked.gather(1, places) | (weights == 0)).all(), "only masked places count"
    assert timestep.min() >= 0 and timestep.max() < 64
    assert masked.sum(-1).unique().numel() > 30, "shares are spread over the batch"


def test_a_checkpoint_without_seconds_goes_on(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    state = torch.load(tmp_path / "base/state.pt", weights_only=True)
    del state["seconds"]
    torch.save(state, tmp_path / "base/state.pt")
    assert train_base.effort(tmp_path / "base") == {"updates": 2, "seconds": 0.0}
    with torch.compiler.set_stance("force_eager"):
        train_base.train(train_base.read_pool(base), tmp_path / "base", steps=3, batch=4)
    assert train_base.effort(tmp_path / "base")["seconds"] > 0


def test_the_rate_rises_stays_and_falls_in_the_last_updates():
    rates = [train_base.rate(step, first=0, steps=1000, decay=200, warmup=100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99:801] == [1.0] * 702 and rates[-1] == pytest.approx(0.005)
    assert train_base.rate(999, first=0, steps=1000, decay=0) == 1.0, "a stage that another one follows"
    assert train_base.rate(500, first=500, steps=1000, decay=0) == 0.01, "new optimizers warm up again"


def test_the_search_finds_the_best_setting_of_every_option():
    def score(temperature: float, guidance: float, remask: float) -> float:
        return -abs(temperature - guidance) - 10 * abs(guidance - 2)

    best = measure.search(score, tuple(measure.SEARCHED))
    assert best == {"temperature": 2.0, "guidance": 2.0, "remask": 0.0}, "the first of equals"
    assert measure.search(score, ("guidance",), rounds=1)["temperature"] == measure.SEARCHED["temperature"][0]


def row(prompts: str, steps: int, r1: float) -> dict:
    """A row of `measure`."""
    return {
        "model": "base", "prompts": prompts, "steps": steps, "guidance": 1.5, "temperature": 4.0, "schedule": "cosine",
        "order": "confidence", "remask": 0.0, "network_evaluations": 2 * steps, "seconds_per_image": 0.1,
        "judge_r1": r1, "judge_r1_spread": None,
    }


@pytest.fixture
def parts() -> dict:
    """What `measure` writes, of a base that reaches one of its targets."""
    best = [row("training", 8, 0.4), row("held-out", 8, 0.2), row("training", 32, 0.6), row("held-out", 32, 0.3)]
    measured = {
        "tokenizer": {"by_design": {"flat 48 px": {"real": 0.7, "reconstructed": 0.6}}, "real": 0.7,
                      "reconstructed": 0.6, "ratio": 0.6 / 0.7, "psnr": 25.0},
        "real": {"training": {"judge_r1": 0.75}, "held-out": {"judge_r1": 0.8}}, "best": best, "concepts": 12,
        "held_out": 2, "prompts": 300, "effort": measure.Effort()._asdict(), "parameters": {"transformer": 4_900_000},
        "training": {"base": {"updates": 60_000, "seconds": 36_000.0}, "tokens": {"updates": 8_000, "seconds": 0.0}},
        "SAMPLING": {"num_inference_steps": 32, "guidance_scale": 1.5}, "curves": best,
        "sheet": {"seed": 3, "steps": 32, "prompts": ["an owl", "an apple"]},
    }
    return measured | {"targets": measure.targets(measured)}


def test_targets_are_ratios_to_real_images_and_of_steps(parts):
    tokenizer, seen, held_out, steps = parts["targets"]
    assert (tokenizer["value"], tokenizer["met"]) == (pytest.approx(0.857, abs=1e-3), False)
    assert (seen["value"], held_out["value"]) == (pytest.approx(0.8), pytest.approx(0.375))
    assert not seen["met"] and not held_out["met"]
    assert (steps["value"], steps["met"]) == (pytest.approx(1.5), True)
    nothing = [dict(line, judge_r1=0.0) for line in parts["best"]]
    assert measure.targets(parts | {"best": nothing})[-1]["met"] is False, "0 to 0 is no success"


def test_the_card_says_what_was_measured(parts):
    text = card.card(parts)
    assert text.startswith("---\nlicense: other\n") and "pipeline_tag: text-to-image" in text
    assert "| transformer and text | 60,000 | 10.0 |" in text and "| 8,000 | – |" in text
    assert "| base, best samplers, R@1 in 32 steps to that in 8 | 1.500 | 1.25 | yes |" in text
    assert "The seed is 3" in text and set(card.LICENCES) == set(data.PACKAGES)
    assert "| base | training | 8 | 16 |" in text, "the curves' rows"


def test_the_last_stage_is_what_a_new_cache_goes_on_from(tmp_path):
    stage = Path(train_base.__file__).parent / "stage"
    train_base.load_stage(stage, tmp_path / "base", tmp_path / "vq")
    assert train_vq.updates(tmp_path / "vq", "tokens") == 8000 and train_vq.updates(tmp_path / "vq", "decoder") == 12000
    words = [CLIPTokenizer.from_pretrained(folder / "tokenizer") for folder in (tmp_path / "base", EMBEDDED.parent)]
    assert words[0].get_vocab() == words[1].get_vocab(), "the shipped model's"
    grounds = torch.tensor([*compose.COLOURS.values()], dtype=torch.uint8)[:, None, None].expand(-1, 64, 64, 3)
    tokens = train_vq.tokens_of(train_vq.load_tokens(tmp_path / "vq"), grounds)
    assert (tokens == tokens[:, :1]).all() and len(set(tokens[:, 0].tolist())) == 5, "a ground is one token"


def test_a_stage_carries_the_averaged_weights_to_another_cache(vq, base, tmp_path):
    train_base.save_stage(base, vq, tmp_path / "stage")
    assert str(vq) not in (tmp_path / "stage/vq/config.json").read_text(encoding="utf-8")
    train_base.load_stage(tmp_path / "stage", tmp_path / "base", tmp_path / "vq")
    assert json.loads((tmp_path / "base/start.json").read_text(encoding="utf-8")) == train_base.effort(base)
    assert train_base.effort(base)["updates"] == 2
    with torch.compiler.set_stance("force_eager"):
        data = train_base.read_pool(base)
        assert train_base.train(data, tmp_path / "base", steps=3, batch=4) == 3
        assert train_base.train(data, tmp_path / "base", steps=3, batch=4) == 3, "nothing is left to do"
    assert train_base.effort(tmp_path / "base")["updates"] == 3
    assert train_base.effort(tmp_path / "base")["seconds"] > train_base.effort(base)["seconds"] > 0, "both stages count"
    before, after = train_base.average_of(base), train_base.average_of(tmp_path / "base")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=5e-3, rtol=5e-3)
    train_base.export(tmp_path / "base", tmp_path / "vq", tmp_path / "generator")
    assert (tmp_path / "generator/transformer/config.json").exists()
