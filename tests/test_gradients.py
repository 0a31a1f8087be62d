"""The study of gradient noise: its statistics against numpy, and what it finds on a tiny generator."""

import copy

import numpy as np
import pytest
import torch

from experiments.study import credit
from experiments.study.gradients import Tally, draw, gradient, in_words, perturbed, study, summary
from speedrl.models.checkpoint import load_generator
from tests.test_train import red


def test_summary_is_the_trace_of_the_covariance_and_the_cosines():
    vectors = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + torch.arange(7.0)
    reference = torch.arange(7.0)
    tally = Tally(torch.zeros(7), 0.0, [])
    for vector in vectors:
        tally = tally.add(vector, reference)
    found = summary(tally, reference, 50)
    assert found["variance"] == pytest.approx(np.trace(np.cov(vectors.numpy().T)), rel=1e-4)
    mean = vectors.mean(0)
    assert found["signal"] == pytest.approx(mean.square().sum().item() - found["variance"] / 50, rel=1e-4)
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(vectors, reference[None]).mean().item(), abs=1e-5)
    assert found["cosine_of_mean"] == pytest.approx(torch.cosine_similarity(mean, reference, 0).item(), abs=1e-5)


@pytest.fixture
def moved(tiny_generator_folder):
    generator = load_generator(tiny_generator_folder)
    reference = copy.deepcopy(generator.transformer).requires_grad_(False)
    perturbed(generator.transformer, away=0.1, seed=0)
    return generator, reference


def test_a_batch_belongs_to_its_number_and_the_kl_is_0_at_the_reference(moved, tiny_generator_folder):
    generator, reference = moved
    options = dict(steps="2-3", groups=2, group_size=2, guidance=1.0, temperature=1.5, order="confidence", seed=0)
    one, same, other = (draw(generator, ["an owl", "a fox"], red, number=n, **options) for n in (3, 3, 4))
    assert torch.equal(one.rollout.tokens, same.rollout.tokens)
    assert not torch.equal(one.rollout.tokens, other.rollout.tokens)
    settings = {"guidance": 1.0, "order": "confidence"}
    away = gradient(generator, reference, one, "ce", **settings)
    split = gradient(generator, reference, one, "ce", micro_batch=1, **settings)
    assert away.norm() > 1e-4 and torch.allclose(away, split, atol=1e-6)
    home = gradient(generator, generator.transformer, one, "ce", **settings)
    assert home.norm() < 1e-5 * away.norm() or home.norm() < 1e-6


def test_estimators_over_the_whole_codebook_are_less_noisy_than_those_of_the_sampled_token(moved):
    options = dict(batches=6, reference_batches=6, groups=2, group_size=4, steps="3")
    names = ("ce", "k3", "reverse", "k2", "k1")
    found = study(*moved, ["an owl", "a fox"], red, names=names, order="random", **options)
    row = {one["estimator"]: one for one in found}
    assert tuple(row) == names
    assert row["k3"]["variance"] > 3 * row["ce"]["variance"] and row["k2"]["variance"] > 3 * row["reverse"]["variance"]
    assert row["ce"]["cosine"] > row["k3"]["cosine"] and row["reverse"]["cosine"] > row["k2"]["cosine"]
    assert row["ce"]["cosine_of_mean"] > 0.95 and row["k3"]["cosine_of_mean"] > 0.8
    assert row["k1"]["signal"] < 0.2 * row["reverse"]["signal"], "its expectation is 0"
    assert any(line.startswith("k3: ") and "times the variance of ce" in line for line in in_words(found))
    with pytest.raises(ValueError, match="at least 2 batches"):
        study(*moved, ["an owl"], red, **options | {"batches": 1})


def test_likelihoods_differ_only_where_an_older_policy_sampled(moved):
    generator, reference = moved
    older = generator._replace(transformer=copy.deepcopy(generator.transformer))
    perturbed(older.transformer, away=0.3, seed=1)
    settings = {"guidance": 1.0, "order": "confidence"}
    options = dict(steps="3", groups=1, group_size=4, seed=0, number=0, temperature=1.5, **settings)
    for sampler, alike in ((generator, True), (older, False)):
        batch = draw(sampler, ["an owl"], red, **options)
        token, sequence, exact = (gradient(generator, reference, batch, n, **settings)
                                  for n in ("token", "sequence", "exact"))  # fmt: skip
        assert torch.allclose(token, sequence, atol=1e-5) == alike
        assert not torch.allclose(token, exact, atol=1e-5)


def test_credit_of_a_step_is_less_noisy_and_leaves_the_network_as_it_was(moved):
    generator, _ = moved
    before = copy.deepcopy(generator.transformer.state_dict())
    found = credit.study(
        generator,
        ["an owl", "a fox"],
        red,
        batches=4,
        test_batches=2,
        lengths=(1.0,),
        groups=2,
        group_size=4,
        steps="3",
    )
    assert [row["credit"] for row in found] == ["token", "rollout", "lambda 1", "lambda 0", "state"]
    rows = {row["credit"]: row for row in found}
    assert rows["lambda 0"]["norm_squared"] < rows["rollout"]["norm_squared"]
    assert rows["token"]["norm_squared"] < rows["lambda 0"]["norm_squared"]
    assert all(row["error_1"] > 0 for row in found)
    after = generator.transformer.state_dict()
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    assert credit.in_words(found)[1].startswith("rollout: 1 of the rollout's squared norm; reward ")


def test_what_a_state_tells_and_what_a_step_changed_make_up_the_advantage(moved):
    generator, _ = moved
    options = dict(steps="3", groups=2, group_size=4, guidance=1.0, temperature=1.0, order="confidence", seed=0)
    batch = draw(generator, ["an owl", "a fox"], red, number=0, **options)
    found, fit = credit.credits(generator, batch, red, torch.zeros(3, 4, dtype=torch.float64), group_size=4)
    torch.testing.assert_close(found["state"] + found["lambda 1"], found["rollout"])
    torch.testing.assert_close(found["lambda 0"].sum(1), found["rollout"][:, 0], atol=1e-4, rtol=1e-4)
    assert fit.shape == (3, 4) and fit[0, 0] > 0
