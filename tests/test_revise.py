"""Revision: what was least sure is drawn again, for no more network calls, and tokens that were drawn apart agree."""

import json

import pytest
import torch

from speedrl.generation import draw, generate
from speedrl.method.remasking import chequered, revise_tokens, revised_counts, split_steps
from speedrl.method.sampling import draw_noise, rollout
from speedrl.models.checkpoint import load_generator, parameters
from speedrl.run.exporting import save_trained
from speedrl.training import train

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl"]
MASK = 4


def twins(tokens, timestep, samples=None, places=None):
    """Two places that show the same one of two codes: either with a half where both are masked, else the other's."""
    logits = torch.zeros(*tokens.shape, 2)
    for place in (0, 1):
        other = tokens[:, 1 - place]
        known = (other != MASK)[:, None] & (torch.arange(2) != other[:, None])
        logits[:, place] = torch.where(known, -torch.inf, 0.0)
    return logits if places is None else logits.gather(1, places[..., None].expand(*places.shape, 2))


def test_tokens_that_were_drawn_apart_agree_once_one_of_them_is_drawn_again():
    noise = draw_noise(4000, 2, 2, seed=0)
    apart = rollout(twins, torch.ones(4000, dtype=torch.int64), noise, length=2, mask_id=MASK)
    agree = (apart.tokens[:, 0] == apart.tokens[:, 1]).double().mean()
    assert abs(agree - 0.5) < 4 * (0.25 / 4000) ** 0.5
    again = revise_tokens(twins, apart, noise.uniform[:, 1:], [1], mask_id=MASK, grid=(1, 2))
    assert (again.tokens[:, 0] == again.tokens[:, 1]).all()
    share = again.tokens.double().mean()  # as often the one as the other: no code is lost
    assert abs(share - 0.5) < 4 * (0.25 / 4000) ** 0.5


def test_the_least_sure_are_drawn_again_one_colour_of_the_chequerboard_at_a_time_with_the_rest_seen():
    seen = []

    def policy(tokens, timestep, samples, places):
        seen.append((tokens.clone(), timestep.clone()))
        logits = torch.zeros(*places.shape, 3)
        logits[..., 2] = 50.0  # sure of code 2 wherever it is asked
        return logits

    grid, length, count = (3, 5), 15, 3
    black = torch.tensor([[(row + column) % 2 == 0 for column in range(5)] for row in range(3)]).flatten()
    noise = draw_noise(count, 4, length, seed=1)
    unsure = lambda tokens, timestep: torch.zeros(*tokens.shape, 3)  # noqa: E731
    first = rollout(unsure, torch.ones(count, dtype=torch.int64), noise, length=length, mask_id=MASK)
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(i)) for i in range(count)])
    first = first._replace(log_probs=-order.float(), tokens=torch.zeros_like(first.tokens))
    again = revise_tokens(policy, first, noise.uniform, [3, 20, 2, 0], mask_id=MASK, grid=grid)
    masked = [tokens == MASK for tokens, _ in seen]
    least = lambda where, n: where & (order >= order.masked_fill(~where, -1).topk(n)[0][:, -1:])  # noqa: E731
    assert torch.equal(masked[0], least(black.expand(count, -1), 3))
    assert torch.equal(masked[1], (~black).expand(count, -1))  # more are asked for than there are
    assert torch.equal(masked[2], least(black & ~masked[0], 2))  # those that were drawn again are sure by now
    assert not masked[3].any()
    for step in masked:
        board = step.unflatten(1, grid)
        assert not (board[:, 1:] & board[:, :-1]).any() and not (board[..., 1:] & board[..., :-1]).any()
    drawn = masked[0] | masked[1] | masked[2]
    assert torch.equal(again.tokens, torch.where(drawn, 2, 0))
    assert all(not timestep.any() for _, timestep in seen)
    assert torch.equal(again.log_probs[~drawn], first.log_probs[~drawn])
    assert (again.log_probs[drawn] > -1e-6).all()


def test_sharpness_is_a_factor_on_the_logits_of_what_is_drawn_again():
    def policy(tokens, timestep, samples, places):
        return torch.tensor([0.0, 1.0]).expand(*places.shape, 2)

    noise = draw_noise(2, 1, 4, seed=0)
    unsure = lambda tokens, timestep: torch.zeros(*tokens.shape, 2)  # noqa: E731
    first = rollout(unsure, torch.ones(2, dtype=torch.int64), noise, length=4, mask_id=MASK)
    sharpness = torch.tensor([1.0, 3.0])
    again = revise_tokens(policy, first, noise.uniform, [4], mask_id=MASK, grid=(1, 4), sharpness=sharpness, sharper=2)
    expected = (torch.tensor([0.0, 1.0]) * torch.tensor([[2.0], [6.0]])).log_softmax(-1).gather(1, again.tokens)
    torch.testing.assert_close(again.log_probs[:, ::2], expected[:, ::2])
    assert torch.equal(again.log_probs[:, 1::2], first.log_probs[:, 1::2])


def test_the_last_steps_revise_ever_fewer_tokens_where_enough_are_left_to_reveal():
    assert [split_steps(n, share=0.5)[1] for n in (1, 5, 6, 8, 11, 12, 16, 18, 32)] == [0, 0, 2, 2, 2, 3, 4, 4, 8]
    assert split_steps(32, share=0.5) == (24, 8)
    assert split_steps(16, share=0.0) == (16, 0)
    assert revised_counts(4, length=256, share=0.5) == [64, 64, 32, 32]
    assert revised_counts(3, length=256, share=0.5) == [64, 64, 32]
    assert revised_counts(0, length=256, share=0.5) == []


def test_neighbours_on_a_chequerboard_have_different_colours():
    board = chequered(3, 4).view(3, 4)
    assert (
        board[0].tolist() == [0, 1, 0, 1] and (board[1:] != board[:-1]).all() and (board[:, 1:] != board[:, :-1]).all()
    )


def test_revised_pictures_cost_as_many_calls_and_do_not_depend_on_the_batch(tiny_generator, monkeypatch):
    calls, network = [], tiny_generator.transformer
    features = network.features
    monkeypatch.setattr(network, "features", lambda tokens, *rest: calls.append(len(tokens)) or features(tokens, *rest))
    plain, _ = draw(tiny_generator, PROMPTS, steps=8, seed=1, guidance=1)
    assert calls == [5] * 8
    calls.clear()
    again, taken = draw(tiny_generator, PROMPTS, steps=8, seed=1, guidance=1, revise=0.5)
    assert calls == [5] * 8 and taken.tolist() == [8] * 5
    assert not torch.equal(plain, again)
    assert torch.equal(again, generate(tiny_generator, PROMPTS, steps=8, seed=1, guidance=1, revise=0.5, batch=2))
    own = tiny_generator._replace(revise=0.5)
    assert torch.equal(again, generate(own, PROMPTS, steps=8, seed=1, guidance=1))
    assert torch.equal(plain, generate(own, PROMPTS, steps=8, seed=1, guidance=1, revise=0.0))
    few = [generate(own, PROMPTS, steps=4, seed=1, revise=share) for share in (0.0, 0.5)]
    assert torch.equal(*few)  # under six steps all are needed to reveal
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must be 0 to 1"):
            generate(tiny_generator, PROMPTS, steps=8, revise=share)


def test_a_trained_model_keeps_the_share_that_it_revises(tiny_generator_folder, tmp_path):
    options = dict(model=str(tiny_generator_folder), prompts=tmp_path / "prompts.txt", iterations=1, groups=1,
                   group_size=2, steps="2", compile=False, tune=False)  # fmt: skip
    options["prompts"].write_text("an owl\n", encoding="utf-8")
    for name, given, share in (("default", {}, 0.5), ("none", {"revise": 0.0}, 0.0)):
        model = train(out=tmp_path / name, **options, **given)
        assert (
            json.loads((model / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))["revised_share"]
            == share
        )
        assert load_generator(model).revise == share
    with pytest.raises(ValueError, match="must be 0 to 1"):
        train(out=tmp_path / "wrong", **options, revise=2.0)


def test_a_checkpoint_of_before_there_was_revision_becomes_a_model_without(tiny_generator, tmp_path):
    settings = dict(model="embedded", steps="4", guidance=1.0, temperature=None, schedule=None, order=None, lora=None,
                    loading={}, merge=False)  # fmt: skip
    learned = {name: value.detach() for name, value in parameters(tiny_generator).items()}
    assert load_generator(save_trained(tmp_path, tiny_generator, learned, None, settings)).revise == 0.0
