"""aMUSEd: diffusers' own model, pipeline and scheduler are the references."""

import copy
import json
from pathlib import Path

import pytest
import torch

from speedrl.generation import draw, make_policy, sample
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import draw_noise, rollout
from speedrl.method.schedules import timesteps
from speedrl.models.generator import decode, encode_prompts
from speedrl.models.loading import load_generator, save_generator
from speedrl.system.platform import import_torchvision
from speedrl.training import train
from tests.conftest import write_tokenizer

import_torchvision()

CODES, MASK = 32, 33


def pipeline():
    """A tiny random AmusedPipeline: 4x4 tokens, 16x16 pixels."""
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=16, cond_embed_dim=32, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=24,
        vocab_size=MASK + 1, codebook_size=CODES, in_channels=8, block_out_channels=8, num_res_blocks=1,
        block_num_heads=1, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, sample_size=4,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    vqvae = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, sample_size=16, num_vq_embeddings=CODES,
        norm_num_groups=4, vq_embed_dim=4, mid_block_add_attention=False, lookup_from_codebook=True,
    )
    text = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=55, hidden_size=24, intermediate_size=32, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=53, eos_token_id=54, pad_token_id=54,
    ))
    return AmusedPipeline(vqvae, None, text.eval(), transformer.eval(), AmusedScheduler(MASK))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Written by diffusers itself."""
    path = tmp_path_factory.mktemp("amused") / "tiny"
    made = pipeline()
    write_tokenizer(path / "tokenizer")
    for name in ("transformer", "vqvae", "text_encoder", "scheduler"):
        getattr(made, name).save_pretrained(path / name)
    index = {name: list(pair) for name, pair in {
        "transformer": ("diffusers", "UVit2DModel"), "vqvae": ("diffusers", "VQModel"),
        "scheduler": ("diffusers", "AmusedScheduler"), "tokenizer": ("transformers", "CLIPTokenizer"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    }.items()}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline"} | index), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return load_generator(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from diffusers import AmusedPipeline

    made = AmusedPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def same_draws(monkeypatch, uniform: torch.Tensor, gumbel: torch.Tensor) -> None:
    """Makes AmusedScheduler take its randomness, step after step, from noise [B, S, L] of ours."""
    import diffusers.schedulers.scheduling_amused as scheduling

    taken = {"multinomial": 0, "gumbel": 0}

    def multinomial(probs, count, generator=None):
        from speedrl.method.likelihoods import sample_tokens

        batch, _, length = uniform.shape
        drawn, _ = sample_tokens(probs.log().view(batch, length, -1), uniform[:, taken["multinomial"]])
        taken["multinomial"] += 1
        return drawn.view(-1, 1)

    def noise(t, generator=None):
        taken["gumbel"] += 1
        return gumbel[:, taken["gumbel"] - 1]

    monkeypatch.setattr(scheduling.torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling, "gumbel_noise", noise)


def test_the_kind_comes_from_the_files(generator):
    assert type(generator.transformer).__name__ == "AmusedTransformer"
    assert (generator.grid, generator.size, generator.mask_id, generator.codes) == ((4, 4), (16, 16), MASK, CODES)
    assert (generator.steps, generator.sampler) == (12, Sampler(guidance=10.0))


def test_logits_are_diffusers_own(generator, theirs):
    prompts = encode_prompts(generator, ["an owl", "a cat", ""])
    tokens = torch.randint(0, MASK + 1, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = generator.transformer(tokens, torch.zeros(3), *prompts)
        wanted = theirs.transformer(tokens, prompts.text, prompts.pooled, prompts.micro_conds)
        torch.testing.assert_close(found, wanted.flatten(2).mT, atol=1e-5, rtol=1e-5)
        features = generator.transformer.features(tokens, torch.zeros(3), *prompts)
        torch.testing.assert_close(generator.transformer.head(features[:, [3, 5]]), found[:, [3, 5]])


def test_either_attention_is_diffusers_own(generator, monkeypatch):
    model, prompts = generator.transformer, encode_prompts(generator, ["an owl", "a cat"])
    tokens = torch.full((2, 4, 4), MASK)
    found = []
    for slow in (True, False):
        monkeypatch.setattr("speedrl.models.amused.fused_attention_is_slow", lambda *_, slow=slow: slow)
        found.append(model(tokens, torch.zeros(2), *prompts))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients_in_training_mode(generator):
    prompts = encode_prompts(generator, ["an owl"])
    tokens = torch.full((1, 4, 4), MASK)
    gradients = []
    for on in (False, True):
        model = copy.deepcopy(generator.transformer).train()
        model.gradient_checkpointing = on
        model(tokens, torch.zeros(1), *prompts).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_decides_as_diffusers_scheduler_on_the_same_draws(generator, theirs, monkeypatch, steps, guidance):
    from diffusers import AmusedScheduler

    length, counts = 16, torch.tensor([steps, steps])
    noise, every = draw_noise(2, steps, length, seed=3), torch.arange(length).expand(2, -1)
    policy = make_policy(generator, ["an owl", "a cat"], guidance=guidance)
    ours = rollout(policy, counts, noise, Sampler())
    seen = ours.states.unbind(1)
    scheduler = AmusedScheduler(MASK)
    scheduler.set_timesteps(steps)
    same_draws(monkeypatch, noise.uniform, noise.gumbel)
    tokens = torch.full((2, length), MASK)
    for s, countdown in enumerate(scheduler.timesteps):
        if not (seen[s] == MASK).any():
            break  # more steps than tokens: theirs masks finished tokens anew, ours is done
        assert torch.equal(seen[s], tokens)
        with torch.no_grad():
            found = policy(tokens, timesteps(counts)[:, s], torch.arange(2), every)
        tokens = scheduler.step(found, countdown, tokens).prev_sample
    if steps <= length:
        assert torch.equal(ours.tokens, tokens)


def test_the_pipeline_draws_the_same_picture_from_the_same_draws(generator, theirs, monkeypatch):
    noise = draw_noise(2, 5, 16, seed=0, names=["0,an owl", "0,a cat"])
    ours = sample(generator, ["an owl", "a cat"], steps=5, sampler=generator.sampler.replace(guidance=3.0))
    same_draws(monkeypatch, noise.uniform, noise.gumbel)
    pictures = theirs(["an owl", "a cat"], num_inference_steps=5, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, pictures, atol=1e-5, rtol=1e-5)


def test_what_training_saves_loads_in_the_pipeline_and_draws_the_same(generator, tmp_path, monkeypatch):
    from diffusers import AmusedPipeline

    trained = copy.deepcopy(generator.transformer)
    torch.nn.init.normal_(trained.mlm_layer.conv2.weight, std=0.5)
    save_generator(generator._replace(transformer=trained, steps=3, sampler=Sampler()), tmp_path / "run/model")
    again = load_generator(tmp_path / "run")
    assert (again.steps, again.sampler) == (3, Sampler())
    made = AmusedPipeline.from_pretrained(tmp_path / "run/model")
    made.set_progress_bar_config(disable=True)
    tokens, _ = draw(again, ["an owl"], steps=3)
    noise = draw_noise(1, 3, 16, seed=0, names=["0,an owl"])
    same_draws(monkeypatch, noise.uniform, noise.gumbel)
    picture = made(["an owl"], num_inference_steps=3, guidance_scale=1.0, output_type="pt").images
    torch.testing.assert_close(decode(again, tokens), picture, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (16, 16)])  # 16x16, 16x32 and 4x4 tokens
def test_a_model_of_another_size_loads_in_the_pipeline_and_draws(folder, tmp_path, size):
    from diffusers import AmusedPipeline

    save_generator(load_generator(folder, size=size), tmp_path / "model")
    again = load_generator(tmp_path / "model")
    assert again.size == size and again.config["sample_size"] == 4
    made = AmusedPipeline.from_pretrained(tmp_path / "model")
    made.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 2, "output_type": "pt"}
    assert made("an owl", **draw).images.shape == (1, 3, 16, 16)
    assert made("an owl", height=size[0], width=size[1], **draw).images.shape == (1, 3, *size)


def test_it_learns_to_choose_its_steps_and_the_pipeline_still_loads_it(folder, tmp_path):
    from diffusers import AmusedPipeline

    train(
        out=tmp_path / "run", model=str(folder), prompts=["a b", "c d"],
        quality=lambda images, prompts: images[:, 1].mean((1, 2)),
        steps="1-4", iterations=2, groups=2, group_size=3, compile=False, guidance=2.0, reference_guidance=2.0,
        search=0, lr=1e-2, warmup=0,
    )
    again = load_generator(tmp_path / "run")
    assert again.step_policy["choices"].tolist() == [1, 2, 4] and again.step_policy["bias"].abs().max() > 0
    assert set(draw(again, ["an owl", "a cat"])[1].tolist()) <= {1, 2, 4}
    made = AmusedPipeline.from_pretrained(tmp_path / "run/model")
    made.set_progress_bar_config(disable=True)
    assert made("an owl", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_known_tokens_stay_in_half_precision_where_the_published_scheduler_masks_them_again(dtype):
    from diffusers import AmusedScheduler

    torch.manual_seed(0)
    batch, length, steps = 64, 256, 8
    outputs = torch.randn(steps, batch, length, CODES).to(dtype)

    def forgotten(states: list[torch.Tensor]) -> int:
        pairs = zip(states, states[1:], strict=False)
        return sum(((before != MASK) & (after != before)).sum().item() for before, after in pairs)

    scheduler = AmusedScheduler(MASK)
    scheduler.set_timesteps(steps)
    theirs = [torch.full((batch, 16, 16), MASK)]
    random = torch.Generator().manual_seed(1)
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        grid = output.mT.unflatten(-1, (16, 16))
        theirs.append(scheduler.step(grid, timestep, theirs[-1], generator=random)[0])

    ours = []

    class Fixed:
        grid, mask_id = (16, 16), MASK

        def __call__(self, tokens, timestep, samples, positions):
            ours.append(tokens)
            found = outputs[len(ours) - 1][samples]
            return found.gather(1, positions[..., None].expand(-1, -1, found.shape[-1]))

    noise = draw_noise(batch, steps, length, seed=0)
    done = rollout(Fixed(), torch.full((batch,), steps), noise, Sampler())
    assert forgotten([*ours, done.tokens]) == 0
    assert (forgotten(theirs) > 0) == (dtype == torch.float16)
