"""Trainings with a range of step counts: the step policy is saved, sampled from, resumed and exported."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from speedrl import cli
from speedrl.generation import draw
from speedrl.models.loading import load_generator, save_generator
from speedrl.run.exporting import export
from speedrl.training import train

PROMPTS = ["an owl", "a fox", "an elk", "a cat", "an owl", "a dog"]


def green(images, prompts):
    return images[:, 1].mean((1, 2))


def given(model, folder):
    (folder / "prompts.txt").write_text("a b\nc d\ne f\n", encoding="utf-8")
    return dict(model=str(model), prompts=str(folder / "prompts.txt"), quality="tests.test_step_policy_run:green",
                steps="1-4", steps_reward=0.5, groups=2, group_size=4, search=0, compile=False, bf16=False, warmup=0,
                iterations=2, lr=3e-3)


@pytest.fixture(scope="module")
def run(tiny_generator_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    train(out=folder / "run", **given(tiny_generator_folder, folder))
    return folder / "run"


def own(generator):
    return generator.step_policy


def test_the_model_keeps_the_average_of_the_step_policy_with_its_sampler(run, tiny_generator):
    held = load_file(run / "checkpoints/000002/tensors.safetensors")
    found = own(load_generator(run))
    assert found["choices"].tolist() == [1, 2, 4]
    assert torch.equal(found["bias"], held["average.steps.bias"]) and found["bias"].abs().max() > 0
    assert torch.equal(found["weight"], held["average.steps.weight"])
    assert not own(tiny_generator)
    assert not any("steps." in name for name in load_generator(run).transformer.state_dict())


def test_a_checkpoint_is_exported_with_it_and_so_is_an_adapter(run, tiny_generator_folder, tmp_path):
    export(run, out=tmp_path / "out")
    found, wanted = own(load_generator(tmp_path / "out")), own(load_generator(run))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    train(out=tmp_path / "lora", lora=2, **given(tiny_generator_folder, tmp_path))
    assert own(load_generator(tmp_path / "lora"))["bias"].abs().max() > 0
    again = shutil.copytree(tmp_path / "lora/adapter", tmp_path / "alone/adapter").parent
    assert own(load_generator(again)).keys() == wanted.keys()


def test_a_training_of_one_step_count_saves_no_step_policy(tiny_generator_folder, tmp_path):
    options = given(tiny_generator_folder, tmp_path) | {"steps": "2", "steps_reward": None}
    train(out=tmp_path / "run", **options)
    assert not own(load_generator(tmp_path / "run"))


def test_sampling_takes_the_most_likely_count_of_each_prompt_unless_a_number_is_given(run, tiny_generator):
    generator = load_generator(run)
    tokens, steps = draw(generator, PROMPTS)
    again, same = draw(generator, PROMPTS, steps="auto", batch=2)
    assert torch.equal(tokens, again) and torch.equal(steps, same) and set(steps.tolist()) <= {1, 2, 4}
    for place, count in enumerate((1, 2, 4)):
        sure = generator.step_policy | {"bias": 9 * torch.eye(3)[place]}
        assert draw(generator._replace(step_policy=sure), PROMPTS)[1].tolist() == [count] * 6
    assert draw(generator, PROMPTS, steps=3)[1].tolist() == [3] * 6
    assert torch.equal(draw(generator, PROMPTS, steps="3")[0], draw(generator, PROMPTS, steps=3)[0])
    assert draw(tiny_generator, PROMPTS)[1].tolist() == [8] * 6
    for wrong in ("many", 0, 17, "1-4"):
        with pytest.raises(ValueError, match="`steps` must be 1 to 16, or auto"):
            draw(generator, PROMPTS, steps=wrong)
    with pytest.raises(ValueError, match="`steps` auto is for a model that was trained with a range"):
        draw(tiny_generator, PROMPTS, steps="auto")


def test_saved_again_the_model_has_the_same_step_policy(run, tmp_path):
    generator = load_generator(run)
    save_generator(generator, tmp_path / "copy")
    found = own(load_generator(tmp_path / "copy"))
    assert all(torch.equal(found[name], value) for name, value in own(generator).items())


def test_the_command_samples_as_the_step_policy_says(run, tiny_generator_folder, tmp_path):
    for steps in ((), ("--steps", "auto"), ("--steps", "2")):
        flags = ["sample", "an owl", "--model", str(run), "--out", str(tmp_path / "x.png"), *steps]
        assert CliRunner().invoke(cli.app, flags).exit_code == 0
    flags = ["sample", "an owl", "--model", str(tiny_generator_folder), "--steps", "auto", "--out",
             str(tmp_path / "y.png")]
    result = CliRunner().invoke(cli.app, flags)
    assert result.exit_code == 2 and "--steps auto" in result.stderr and not (tmp_path / "y.png").exists()
