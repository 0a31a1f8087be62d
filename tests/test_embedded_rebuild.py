"""What rebuilds the embedded model: its tokenizer's written encoder, pasted tokens, and the base's training states."""

import numpy as np
import pytest
import torch

from experiments.embedded import compose, train_base, train_vq
from speedrl.system.platform import import_torchvision


@pytest.fixture(scope="module")
def sprites() -> np.ndarray:
    """Two things in two designs: blobs of colour with soft edges, uint8 [2, 2, 64, 64, 4]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 63 * 2 - 1
    table = np.zeros((2, 2, 64, 64, 4), np.uint8)
    for thing, style in np.ndindex(2, 2):
        table[thing, style, ..., :3] = rng.integers(0, 255, 3) + 40 * np.sin(6 * x * rng.random() + y)[..., None]
        table[thing, style, ..., 3] = 255 * np.clip(6 * (0.8 - np.hypot(x * (1 + style / 2), y)), 0, 1)
    return table


@pytest.fixture(scope="module")
def pictures(sprites) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([compose.paint(compose.draw(rng, concepts=2), sprites) for _ in range(60)])


@pytest.fixture(scope="module")
def centres(pictures, tmp_path_factory) -> torch.Tensor:
    return train_vq.codebook(pictures, tmp_path_factory.mktemp("codes") / "centres.pt", codes=1024)


def test_the_written_encoder_names_the_nearest_code(pictures, centres):
    import_torchvision()
    model = train_vq.new_vqmodel(codes=len(centres)).eval()
    mean = centres.mean(0)
    axes = torch.linalg.svd(centres - mean, full_matrices=False)[2][:24]
    train_vq.write_encoder(model, axes, mean)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_((centres - mean) @ axes.T)
        found = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255).latents
        named = model.quantize(found)[2][2].flatten()
    points = train_vq.patches(torch.from_numpy(pictures))
    wanted = ((points - mean) @ axes.T).unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=1e-3)
    points = points.flatten(0, 1)
    far, least = ((points - centres[code]).norm(dim=-1) for code in (named, train_vq.nearest(points, centres)))
    assert (far - least < 0.1).float().mean() > 0.99  # of codes that lie closer together than that, either will do


def test_pasted_tokens_are_those_of_the_painted_picture(sprites, centres):
    tables = train_base.token_tables(sprites, centres)
    rng = np.random.default_rng(2)
    for _ in range(20):
        picture = compose.draw(rng, concepts=2, pair=0.3)
        painted = torch.from_numpy(compose.paint(picture, sprites))[None]
        wanted = train_vq.nearest(train_vq.patches(painted)[0], centres).view(16, 16)
        assert np.array_equal(train_base.paste(picture, tables), wanted.numpy())


def test_a_card_is_the_same_tokens_on_every_background_but_for_its_corners(sprites, centres):
    for size, table in train_base.token_tables(sprites, centres).items():
        inside = np.ones((size // 4, size // 4), bool)
        inside[np.ix_([0, -1], [0, -1])] = False
        assert (table == table[:, :, :1])[..., inside].all()
        assert not (table == table[:, :, :1])[:, :, 1:, ~inside].any(), "corners show the background"


def test_the_loss_weighs_every_masked_token_once_and_scores_all_of_the_things():
    torch.manual_seed(0)
    first_ground = train_base.CODES - len(compose.FLAT)
    tokens = torch.where(torch.rand(64, 256) < 0.3, torch.randint(first_ground, (64, 256)), first_ground + 1)
    noisy, timestep, places, weights = train_base.corrupt(tokens)
    masked = noisy == train_base.MASK
    assert torch.equal(noisy[~masked], tokens[~masked])
    torch.testing.assert_close(weights.sum(-1), masked.sum(-1).float())
    assert (masked.gather(1, places) | (weights == 0)).all(), "only masked places count"
    things = masked & (tokens < first_ground)
    scored = torch.zeros_like(masked).scatter(1, places, weights > 0)
    assert torch.equal(scored & things, things)
    assert timestep.min() >= 0 and timestep.max() < 64
    assert masked.sum(-1).unique().numel() > 30, "shares are spread over the batch"


def test_captions_say_only_what_is_there():
    rng, names = np.random.default_rng(3), ["apple", "owl"]
    for _ in range(300):
        picture = compose.draw(rng, concepts=2)
        words = compose.caption(picture, names, [[], []], rng).split()
        assert picture.colour in words or not set(words) & set(compose.COLOURS)
        assert compose.STYLES[picture.style] in words or not set(words) & set(compose.STYLES)
        assert {names[i] for i in picture.things} >= set(words) & set(names)
