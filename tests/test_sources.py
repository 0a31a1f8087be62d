"""Where models come from: shards, half-precision variants, the hub, records of other folders, moved bases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speedrl.models.generator import cut_prompts
from speedrl.models.loading import load_generator, save_generator
from speedrl.models.lora import add_lora, save_lora
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.models.sources import WEIGHTS, recorded_source, resolve_source, resolve_text_encoder
from speedrl.run.checkpoints import save, tensors
from speedrl.run.exporting import export
from tests.conftest import TRANSFORMER
from tests.hub import COMMIT, loopback_hub

ROOT = Path(__file__).parents[1]


def shard(folder: Path, *, variant: str = "") -> Path:
    """Every part's weights as two shards and an index, named as diffusers and transformers name them."""
    for part, name in WEIGHTS.items():
        state = load_file(folder / part / f"{name}.safetensors")
        keys = sorted(state)
        files = {
            key: f"{name}-{1 + (i >= len(keys) // 2):05d}-of-00002{variant}.safetensors" for i, key in enumerate(keys)
        }
        for file in set(files.values()):
            save_file({key: state[key] for key in keys if files[key] == file}, folder / part / file)
        index = f"{name}.safetensors.index{variant}.json"
        (folder / part / index).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
        (folder / part / f"{name}.safetensors").unlink()
    return folder


def halve(folder: Path) -> Path:
    """fp16 variants alone."""
    for part, name in WEIGHTS.items():
        path = folder / part / f"{name}.safetensors"
        state = {key: v.half() if v.is_floating_point() else v for key, v in load_file(path).items()}
        save_file(state, folder / part / f"{name}.fp16.safetensors", metadata={"format": "pt"})
        path.unlink()
    return folder


FORMS = {"whole": lambda f: f, "sharded": shard, "fp16": halve, "sharded fp16": lambda f: shard(f, variant=".fp16")}


@pytest.fixture(scope="module", params=FORMS)
def form(request, tiny_generator_folder, tmp_path_factory):
    """The tiny generator, its files in each form."""
    return FORMS[request.param](shutil.copytree(tiny_generator_folder, tmp_path_factory.mktemp("forms") / "tiny"))


def same(one, other):
    for key, value in one.transformer.state_dict().items():
        torch.testing.assert_close(other.transformer.state_dict()[key], value, atol=2e-3, rtol=1e-3)


def test_a_folder_loads_in_every_form(form, tiny_generator):
    same(tiny_generator, load_generator(form))


def test_a_text_encoder_of_its_own_loads_in_every_form(form, tiny_generator_folder):
    load_generator(tiny_generator_folder, text_encoder=form / "text_encoder")


def test_a_missing_shard_is_one_line(tiny_generator_folder, tmp_path):
    folder = shard(shutil.copytree(tiny_generator_folder, tmp_path / "tiny"))
    (folder / "vqvae/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"/vqvae is another model's, or not whole: .*Missing key"):
        load_generator(folder)


def away(hub: str, cache: Path, script: str, *arguments, cwd: Path = ROOT) -> str:
    """What a script prints in a process that knows the hub of this address and no other."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT),
                                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                                "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADS = """
import sys
from speedrl.models.loading import load_generator
from speedrl.models.sources import resolve_source
print(resolve_source(sys.argv[1]))
for source in (sys.argv[1], resolve_source(sys.argv[1])):
    g = load_generator(source, text_encoder=sys.argv[2] if len(sys.argv) > 2 else None)
    print(g.grid, f"{sum(p.double().sum().item() for p in g.transformer.parameters()):.1f}")
"""


def total(generator) -> str:
    return f"{sum(p.double().sum().item() for p in generator.transformer.parameters()):.1f}"


def test_a_hub_repository_loads_in_every_form_and_is_recorded_with_its_commit(form, tmp_path):
    asked = []
    with loopback_hub({"someone/tiny": form}, asked) as hub:
        said = away(hub, tmp_path / "cache", LOADS, "someone/tiny").splitlines()
    assert said == [f"someone/tiny@{COMMIT}", *[f"(4, 4) {total(load_generator(form))}"] * 2]
    assert not [path for path in asked if path.endswith((".bin", ".msgpack"))]


def test_fp16_files_are_not_fetched_where_there_are_others(tiny_generator_folder, tmp_path):
    folder = shutil.copytree(tiny_generator_folder, tmp_path / "both")
    for part in halve(shutil.copytree(folder, tmp_path / "half")).glob("*/*.fp16.safetensors"):
        shutil.copy(part, folder / part.parent.name)
    asked = []
    with loopback_hub({"someone/both": folder}, asked) as hub:
        away(hub, tmp_path / "cache", LOADS, "someone/both")
    assert len([path for path in asked if path.endswith(".safetensors")]) >= len(WEIGHTS)
    assert not [path for path in asked if "fp16" in path]


def test_an_adapter_and_a_text_encoder_on_the_hub_load(tiny_generator_folder, tmp_path):
    write_adapter(tmp_path / "adapter", base="someone/tiny")
    halve(shutil.copytree(tiny_generator_folder, tmp_path / "half"))
    there = {"someone/tiny": tiny_generator_folder, "someone/adapter": tmp_path / "adapter",
             "someone/clip": tmp_path / "half/text_encoder"}
    with loopback_hub(there, []) as hub:
        said = away(hub, tmp_path / "cache", LOADS, "someone/adapter", "someone/clip").splitlines()
    expected = load_generator(tmp_path / "adapter", base=tiny_generator_folder)
    assert said == [f"someone/adapter@{COMMIT}", *[f"(4, 4) {total(expected)}"] * 2]


def write_adapter(out: Path, *, base: str) -> None:
    """An adapter of the tiny generator that changes it."""
    transformer = MeissonicTransformer(**TRANSFORMER)
    add_lora(transformer, rank=2)
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(value, 0.05)
    save_lora(transformer, out, base=base, scheduler={"mask_token_id": 39})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 16}},
        {"exclude_modules": ["transformer_blocks.0.attn.to_v"]},
    ],
    ids=["plain", "rslora", "patterns", "excluded"],
)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(tiny_generator_folder, tmp_path, more):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wanted = load_generator(tiny_generator_folder).transformer
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False, **more)
    adapted = get_peft_model(wanted, config)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().state_dict()
    found = load_generator(tmp_path / "adapter", base=tiny_generator_folder).transformer.state_dict()
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted)


def test_an_adapter_that_is_not_all_read_is_refused(tiny_generator_folder, tmp_path):
    from peft import IA3Config, LoraConfig, get_peft_model

    for name, config, says in (
        ("dora", LoraConfig(target_modules=["to_q"], use_dora=True), r"weights that are not read \(.*lora_magnitude"),
        ("ia3", IA3Config(target_modules=["to_q"], feedforward_modules=[]), "another model's adapter .*IA3Config"),
    ):
        transformer = load_generator(tiny_generator_folder).transformer
        get_peft_model(transformer, config).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=says) as caught:
            load_generator(tmp_path / name, base=tiny_generator_folder)
        assert "\n" not in str(caught.value)
    write_adapter(tmp_path / "narrow", base=str(tiny_generator_folder))
    config = json.loads((tmp_path / "narrow/adapter_config.json").read_text(encoding="utf-8")) | {"r": 4}
    (tmp_path / "narrow/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="another model's adapter .*size mismatch"):
        load_generator(tmp_path / "narrow")


def test_an_adapter_whose_base_has_moved_names_it_and_takes_another(tiny_generator_folder, tiny_generator, tmp_path):
    base = shutil.copytree(tiny_generator_folder, tmp_path / "base")
    write_adapter(tmp_path / "run/adapter", base=str(base))
    before = load_generator(tmp_path / "run")
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"the adapter \S+/run/adapter was trained on \S+/base, .* by `base`$"):
        load_generator(tmp_path / "run")
    after = load_generator(tmp_path / "run", base=tmp_path / "moved")
    assert torch.equal(*(g.transformer.embed.conv.weight for g in (before, after)))
    assert total(before) != total(tiny_generator)
    with pytest.raises(ValueError, match="`base` is for an adapter"):
        load_generator(tmp_path / "moved", base=tmp_path / "moved")
    with pytest.raises(ValueError, match="is an adapter itself"):
        load_generator(tmp_path / "run", base=tmp_path / "run/adapter")


def test_a_source_is_recorded_so_that_it_holds_elsewhere(tiny_generator_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_generator_folder.parent)
    assert resolve_source(tiny_generator_folder.name) == str(tiny_generator_folder)
    assert resolve_source("embedded") == "embedded"
    assert resolve_text_encoder("tiny/text_encoder") == str(tiny_generator_folder / "text_encoder")
    monkeypatch.chdir(tmp_path)
    for kept in ("embedded", str(tiny_generator_folder), f"someone/tiny@{COMMIT}"):
        assert recorded_source(kept, where="the run") == kept
    with pytest.raises(FileNotFoundError, match="the run was trained from /nowhere/tiny, .* say by `model`"):
        recorded_source("/nowhere/tiny", where="the run")


def write_checkpoint(out: Path, generator, *, model: str, **more) -> None:
    """A run's checkpoint as training writes it, with the weights doubled."""
    learned = dict(generator.transformer.named_parameters())
    nothing = (*generator.sampler.settings(), "text_encoder", "size", "negative_prompt", "micro_conds", "lora",
               "lora_alpha", "lora_targets")
    settings = dict.fromkeys(nothing) | {"model": model, "steps": "2", "guidance": 1.0}
    doubled = {name: torch.nn.Parameter(p.detach() * 2) for name, p in learned.items()}
    found = tensors(doubled, torch.optim.SGD(list(doubled.values())), {})
    save(out, 1, found, {}, {"settings": settings | more}, keep=1)


def test_export_finds_a_base_that_has_moved_by_model(tiny_generator_folder, tiny_generator, tmp_path):
    write_checkpoint(tmp_path / "run", tiny_generator, model=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"trained from \S+/gone, .* `model`"):
        export(tmp_path / "run", out=tmp_path / "out")
    assert export(tmp_path / "run", out=tmp_path / "out", model=str(tiny_generator_folder)) == tmp_path / "out/model"
    write_checkpoint(tmp_path / "auto", tiny_generator, model=str(tiny_generator_folder), steps="auto:4")
    with pytest.raises(ValueError, match="cannot be exported: `steps` takes a number, a range or a list"):
        export(tmp_path / "auto", out=tmp_path / "other")


def test_what_the_sampler_learned_is_saved_beside_its_configuration(tiny_generator, tmp_path):
    sampler = tiny_generator.sampler.replace(scalars=torch.rand(7, 4), order="halton", guidance=2.5, remask=0.25)
    policy = {"bias": torch.zeros(3), "choices": torch.tensor([1, 2, 4])}
    save_generator(tiny_generator._replace(sampler=sampler, step_policy=policy), tmp_path / "model")
    again = load_generator(tmp_path / "model")
    assert again.sampler == sampler and torch.equal(again.sampler.scalars, sampler.scalars)
    assert again.step_policy.keys() == policy.keys()
    assert all(torch.equal(again.step_policy[name], policy[name]) for name in policy)
    save_generator(tiny_generator, tmp_path / "model")
    plain = load_generator(tmp_path / "model")
    assert plain.sampler == tiny_generator.sampler and plain.sampler.scalars is None and not plain.step_policy
    (tmp_path / "model/scheduler/sampler.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="sampler.safetensors is damaged"):
        load_generator(tmp_path / "model")


def test_guidance_below_one_is_read_as_the_pipelines_read_it(tiny_generator_folder, tmp_path):
    folder = shutil.copytree(tiny_generator_folder, tmp_path / "tiny")
    (folder / "scheduler/scheduler_config.json").write_text('{"guidance_scale": 0.0}', encoding="utf-8")
    assert load_generator(folder).sampler.guidance == 1


def test_prompts_that_are_too_long_are_counted(tiny_generator):
    assert cut_prompts(tiny_generator, ["a b c", "", "abcdef", "abcdefg", "a b c d e f g h"]) == 2  # 8 with both ends
    assert cut_prompts(tiny_generator, ["a b c d e f g h"] * 2000 + ["a"]) == 2000
