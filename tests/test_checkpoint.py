"""Loading and saving: round trips, agreement with the libraries, and what wrong folders say."""

import json
import shutil

import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file

from speedrl.generation import draw as draw_tokens
from speedrl.generation import sample
from speedrl.method.sampler import Sampler
from speedrl.models.generator import decode, encode_prompts, index_prompts, repeat_prompts
from speedrl.models.loading import load_generator, save_generator

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def drawn(*inputs, **options):
    return draw_tokens(*inputs, **options)[0]


@pytest.fixture
def damaged(tiny_generator_folder, tmp_path):
    """A copy to do harm to."""
    return shutil.copytree(tiny_generator_folder, tmp_path / "damaged")


def states(generator):
    modules = generator.transformer, generator.vqvae, generator.text_encoder
    return {(i, key): value for i, module in enumerate(modules) for key, value in module.state_dict().items()}


def test_what_is_read_from_the_folder(tiny_generator):
    g = tiny_generator
    assert (g.grid, g.size, g.mask_id, g.codes) == ((4, 4), (16, 16), 39, 32)
    assert (g.steps, g.sampler) == (6, Sampler(guidance=3.0, temperature=1.5))
    assert not any(module.training for module in (g.transformer, g.vqvae, g.text_encoder))
    assert all(p.requires_grad for p in g.transformer.parameters())
    assert not any(p.requires_grad for module in (g.vqvae, g.text_encoder) for p in module.parameters())


def test_a_released_scheduler_and_configuration_leave_the_rest_to_defaults(damaged):
    (damaged / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "Scheduler"}), encoding="utf-8")
    config = json.loads((damaged / "transformer/config.json").read_text(encoding="utf-8"))
    del config["sample_size"]
    (damaged / "transformer/config.json").write_text(json.dumps(config), encoding="utf-8")
    g = load_generator(damaged)
    assert (g.grid, g.size, g.mask_id) == ((64, 64), (256, 256), 39)
    assert (g.steps, g.sampler) == (64, Sampler(guidance=9.0))
    assert g.negative.startswith("worst quality") and g.micro_conds == (256, 256, 0, 0, 6)


def test_a_configuration_without_sampling_down_is_of_512_pixels(tiny_generator, damaged):
    """As Monetico's, which says neither its size nor how it samples."""
    import copy

    transformer = copy.deepcopy(tiny_generator.transformer)
    transformer.down_block = transformer.up_block = torch.nn.ModuleDict()
    save_file(transformer.state_dict(), damaged / WEIGHTS)
    path = damaged / "transformer/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("sample_size", "downsample", "upsample"):
        del config[key]
    path.write_text(json.dumps(config), encoding="utf-8")
    (damaged / "scheduler/scheduler_config.json").write_text("{}", encoding="utf-8")
    g = load_generator(damaged)
    assert (g.grid, g.size, g.steps) == ((32, 32), (128, 128), 48)  # 4 pixels to a token here
    save_generator(g, damaged / "again")
    assert load_generator(damaged / "again").grid == (32, 32)


def test_size_negative_prompt_and_micro_conditions_can_be_chosen_and_are_saved(tiny_generator_folder, tmp_path):
    g = load_generator(tiny_generator_folder, size=(16, 32), negative="an owl", micro_conds=(1, 2, 3, 4, 5))
    assert (g.grid, g.size) == ((4, 8), (16, 32))
    assert torch.equal(encode_prompts(g, ["a", "b"]).micro_conds, torch.tensor([[1.0, 2, 3, 4, 5]] * 2))
    assert sample(g, ["an owl"], steps=2).shape == (1, 3, 16, 32)
    save_generator(g, tmp_path / "model")
    again = load_generator(tmp_path / "model")
    assert (again.grid, again.negative, again.micro_conds) == (g.grid, g.negative, g.micro_conds)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 16 and 20"):
        load_generator(tiny_generator_folder, size=(16, 20))


def test_guidance_leads_away_from_the_negative_prompt(tiny_generator):
    own = tiny_generator.sampler
    draw = {"steps": 3, "sampler": own.replace(guidance=4.0), "seed": 1}
    away = drawn(tiny_generator._replace(negative="an owl"), ["cat"] * 8, **draw)
    assert not torch.equal(away, drawn(tiny_generator, ["cat"] * 8, **draw))
    alone = drawn(tiny_generator, ["cat"] * 8, **draw | {"sampler": own.replace(guidance=1.0)})
    # from a prompt to itself there is no way
    assert torch.equal(drawn(tiny_generator._replace(negative="cat"), ["cat"] * 8, **draw), alone)


def test_another_text_encoder_takes_the_place_of_the_generators_own(tiny_generator_folder, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(3)
    g = load_generator(tiny_generator_folder)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 8, "patch_size": 4}
    told = ("architectures", "model_type", "projection_dim")  # by the whole CLIP's configuration
    text = {k: v for k, v in g.text_encoder.config.to_dict().items() if k not in told}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))  # as on the hub
    whole.save_pretrained(tmp_path / "clip")
    other = load_generator(tiny_generator_folder, text_encoder=tmp_path / "clip")
    found = encode_prompts(other, ["an owl"])
    ids = g.tokenizer(["an owl"], padding="max_length", max_length=8, return_tensors="pt").input_ids
    wanted = whole.get_text_features(ids)
    wanted = wanted if torch.is_tensor(wanted) else wanted.pooler_output
    torch.testing.assert_close(found.pooled, wanted)
    assert not torch.allclose(found.text, encode_prompts(g, ["an owl"]).text)
    with pytest.raises(FileNotFoundError, match=r"there is no \S+/config.json"):
        load_generator(tiny_generator_folder, text_encoder=tiny_generator_folder)


def test_saving_and_loading_changes_nothing(tiny_generator, tmp_path):
    save_generator(tiny_generator, tmp_path / "run/model")
    again = load_generator(tmp_path / "run")  # a run's folder is as good as the model in it
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    before, after = states(tiny_generator), states(again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert again[6:] == tiny_generator[6:] and again.config == tiny_generator.config
    assert tiny_generator.scheduler.items() <= again.scheduler.items()
    assert again.config["_class_name"] == "Transformer2DModel"
    prompts = ["an owl", ""]
    for one, other in zip(encode_prompts(tiny_generator, prompts), encode_prompts(again, prompts), strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_is_what_the_libraries_read(tiny_generator, tmp_path):
    from diffusers import VQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    save_generator(tiny_generator, tmp_path / "model")
    vqvae = VQModel.from_pretrained(tmp_path / "model/vqvae")
    text, report = CLIPTextModelWithProjection.from_pretrained(
        tmp_path / "model/text_encoder", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for ours, theirs in ((tiny_generator.vqvae, vqvae), (tiny_generator.text_encoder, text)):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    (tmp_path / "model/tokenizer/tokenizer.json").unlink()  # vocab.json and merges.txt are enough, as released
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "model/tokenizer")
    assert tokenizer("an owl").input_ids == tiny_generator.tokenizer("an owl").input_ids


def test_half_precision_files_are_cast(tiny_generator, tmp_path):
    save_generator(tiny_generator, tmp_path / "model", dtype=torch.float16)
    assert load_file(tmp_path / "model" / WEIGHTS)["mlm_layer.conv2.weight"].dtype == torch.float16
    again = load_generator(tmp_path / "model")
    assert {value.dtype for value in states(again).values()} == {torch.float32}
    torch.testing.assert_close(states(again), states(tiny_generator), atol=1e-3, rtol=1e-3)
    low = load_generator(tmp_path / "model", dtype=torch.bfloat16)
    assert low.transformer.mlm_layer.conv2.weight.dtype == torch.bfloat16
    assert low.vqvae.quantize.embedding.weight.dtype == torch.float32
    assert encode_prompts(low, ["a"]).text.dtype == torch.bfloat16


def test_the_fp16_variant_is_found(damaged):
    (damaged / WEIGHTS).rename(damaged / WEIGHTS.replace(".safe", ".fp16.safe"))
    load_generator(damaged)


def test_saving_replaces_a_model_but_no_other_folder(tiny_generator, tmp_path):
    save_generator(tiny_generator, tmp_path / "model")
    save_generator(tiny_generator, tmp_path / "model")
    load_generator(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="overwritten"):
        save_generator(tiny_generator, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


def test_prompts_are_clips_own(tiny_generator):
    prompts = encode_prompts(tiny_generator, ["an owl", "", "an owl"])
    ids = tiny_generator.tokenizer(["an owl", ""], padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = tiny_generator.text_encoder(ids, output_hidden_states=True)
    torch.testing.assert_close(prompts.text, expected.hidden_states[-2][[0, 1, 0]])
    torch.testing.assert_close(prompts.pooled, expected.text_embeds[[0, 1, 0]])
    assert prompts.micro_conds.tolist() == [[16, 16, 0, 0, 6]] * 3
    assert torch.equal(index_prompts(prompts, torch.tensor([1, 0])).text, prompts.text[[1, 0]])
    assert torch.equal(repeat_prompts(prompts, 2).pooled, prompts.pooled[[0, 0, 1, 1, 2, 2]])


def test_long_prompts_are_cut_and_no_prompt_is_an_error(tiny_generator):
    assert encode_prompts(tiny_generator, ["abcdefghijkl " * 20]).text.shape[1] == 8
    with pytest.raises(ValueError, match="no prompt"):
        encode_prompts(tiny_generator, [])


def test_decoded_pictures_are_the_vqmodels_and_do_not_depend_on_the_batch(tiny_generator):
    tokens = torch.randint(tiny_generator.codes, (5, 16), generator=torch.Generator().manual_seed(0))
    pictures = decode(tiny_generator, tokens)
    assert pictures.shape == (5, 3, 16, 16) and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    latents = tiny_generator.vqvae.quantize.embedding(tokens).view(5, 4, 4, 4).permute(0, 3, 1, 2)
    expected = tiny_generator.vqvae.decoder(tiny_generator.vqvae.post_quant_conv(latents))
    torch.testing.assert_close(pictures, expected.clamp(0, 1).detach())
    torch.testing.assert_close(decode(tiny_generator, tokens, batch=2), pictures)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(decode(tiny_generator, tokens), pictures)


def test_bf16_decodes_the_same_picture_roughly_and_is_for_models_in_it(tiny_generator, tiny_generator_folder):
    tokens = torch.randint(tiny_generator.codes, (3, 16), generator=torch.Generator().manual_seed(0))
    exact, rough = decode(tiny_generator, tokens), decode(tiny_generator, tokens, bf16=True)
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert (exact - rough).abs().mean() < 1 / 255
    low = load_generator(tiny_generator_folder, dtype=torch.bfloat16)
    assert torch.equal(decode(low, tokens), rough) and torch.equal(decode(low, tokens, bf16=False), exact)


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("harm", "kind", "says"),
    [
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no model at"),
        (lambda f: shutil.rmtree(f / "transformer"), FileNotFoundError, "transformer/config.json"),
        (lambda f: shutil.rmtree(f / "scheduler"), FileNotFoundError, "scheduler_config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), FileNotFoundError, "vocab.json"),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "no diffusion_pytorch_model.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), ValueError, "half written"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, "half written"),
        (lambda f: (f / "transformer/config.json").write_text("{", encoding="utf-8"), ValueError, "not json"),
        (lambda f: (f / "transformer/config.json").write_text("[]", encoding="utf-8"), ValueError, "object"),
        (lambda f: (f / "text_encoder/config.json").write_bytes(b'{"hidden_size": "a"}'), ValueError, "no such model"),
        (lambda f: (f / "tokenizer/merges.txt").write_text("an owl\n" * 3, encoding="utf-8"), ValueError, "tokenizer"),
        (lambda f: edit(f / WEIGHTS, lambda s: s.pop("embed.conv.weight")), ValueError, 'Missing key.* "embed.conv'),
        (lambda f: edit(f / WEIGHTS, lambda s: s.update(a=torch.ones(1))), ValueError, 'Unexpected key.* "a"'),
        (
            lambda f: edit(f / WEIGHTS, lambda s: s.update({"mlm_layer.conv2.weight": torch.ones(9, 32, 1, 1)})),
            ValueError,
            "size mismatch for mlm_layer.conv2.weight",
        ),
    ],
)
def test_a_damaged_folder_says_what_is_wrong_in_one_line(damaged, harm, kind, says):
    harm(damaged)
    with pytest.raises(kind, match=says) as caught:
        load_generator(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("scheduler/scheduler_config.json", {"mask_token_id": 40}, "beside the codes, 32 to 39, got 40"),
        ("scheduler/scheduler_config.json", {"mask_token_id": 31}, "32 to 39, got 31"),
        ("transformer/config.json", {"_class_name": "Mixer"}, r"class Mixer: load_generator\(..., transformer=Mixer\)"),
        ("transformer/config.json", {"sample_size": [4, 8]}, "do not say its size: give `size`"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(damaged, part, change, says):
    config = json.loads((damaged / part).read_text(encoding="utf-8")) | change
    (damaged / part).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_generator(damaged)


def test_a_codebook_smaller_than_the_transformers_codes_is_one_line(tiny_generator, damaged):
    from diffusers import VQModel

    VQModel(**dict(tiny_generator.vqvae.config) | {"num_vq_embeddings": 31}).save_pretrained(damaged / "vqvae")
    with pytest.raises(ValueError, match="the VQ model has 31 codes, but the transformer draws from 32"):
        load_generator(damaged)


def test_many_wrong_keys_are_not_all_listed(damaged):
    edit(damaged / WEIGHTS, lambda state: [state.pop(key) for key in list(state) if "blocks" in key])
    with pytest.raises(ValueError, match=r"is another model's, or not whole: .*\.\.\.$") as caught:
        load_generator(damaged)
    assert len(str(caught.value)) < 500


def test_a_text_file_and_an_unknown_hub_id_are_no_models(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("an owl\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        load_generator(tmp_path / "prompts.txt")
    with pytest.raises(FileNotFoundError, match="there is no model at no/such/folder"):
        load_generator("no/such/folder")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "is gated on the hub: accept its terms there and run `hf auth login`"),
        ("RepositoryNotFoundError", "is not on the hub, or is private"),
        ("LocalEntryNotFoundError", "is not cached and the hub cannot be reached"),
        ("OfflineModeIsEnabled", "is not cached and the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_its_cause(monkeypatch, error, says):
    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError) as caught:
        load_generator("someone/something")
    where = "someone/something is no folder here, and as a hub id it"
    assert str(caught.value) == f"{where} {says}; give a folder, a hub id owner/name, or embedded"


def test_a_pickle_is_refused(damaged):
    (damaged / WEIGHTS).rename(damaged / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors, and pickles .* are not read"):
        load_generator(damaged)


def test_an_unknown_device_is_one_line(tiny_generator_folder):
    with pytest.raises(ValueError, match="`device` bogus cannot be used"):
        load_generator(tiny_generator_folder, device="bogus")
