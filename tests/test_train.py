"""The loop on a tiny generator: it learns, resumes exactly, and refuses what cannot work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from speedrl.method.schedules import step_range
from speedrl.method.search import settled
from speedrl.models.checkpoint import encode_prompts, load_generator
from speedrl.run.settings import doubtful
from speedrl.training import train
from speedrl.updates import trained_steps


def red(images, prompts):
    """A reward that a tiny generator can raise: how red a picture is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def flat(images, prompts):
    """The same, rounded in numpy: a reward without a gradient."""
    return torch.from_numpy(red(images, prompts).numpy().round(3))


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\ne f\n", encoding="utf-8")
    return dict(model=str(tiny_generator_folder), prompts=prompts, quality="tests.test_train:red", steps="3", groups=2,
                group_size=4, compile=False, bf16=False, lr=3e-3, eps=1e-8)  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder):
    return load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")


def test_reward_rises_and_the_model_is_saved_in_the_layout_it_came_in(options, tmp_path):
    saved = train(out=tmp_path / "run", iterations=25, kl_weight=0.0, **options)
    rows = metrics(tmp_path / "run")
    assert len(rows) == 25
    assert sum(r["quality"] for r in rows[-5:]) > sum(r["quality"] for r in rows[:5])
    assert load_generator(saved).grid == load_generator(options["model"]).grid


def test_bf16_is_the_processors_choice_unless_it_is_given(options, tmp_path, monkeypatch):
    """What is computed in it is near what is in float32, and the ratio is 1 to the letter: both sides are in it."""
    del options["bf16"]
    monkeypatch.setattr("speedrl.training.bf16_is_fast", lambda device: True)
    for name, given in (("chosen", {}), ("on", {"bf16": True}), ("off", {"bf16": False})):
        train(out=tmp_path / name, iterations=1, save_every=1, **options | given)
        record = json.loads((tmp_path / name / "checkpoints/000001/state.json").read_text(encoding="utf-8"))
        assert record["settings"]["bf16"] is (name != "off")
    rows = {name: metrics(tmp_path / name)[0] for name in ("chosen", "on", "off")}
    assert rows["chosen"]["grad_norm"] == rows["on"]["grad_norm"] != rows["off"]["grad_norm"]
    assert rows["on"]["grad_norm"] == pytest.approx(rows["off"]["grad_norm"], rel=0.2)
    assert rows["on"]["ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("likelihood", ["token", "sequence", "exact"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_ratio_is_one_and_kl_zero_before_the_first_update(options, tmp_path, likelihood, guidance):
    train(out=tmp_path / "run", iterations=1, likelihood=likelihood, guidance=guidance, reference_guidance=guidance,
          **options | {"steps": "1-4"})  # fmt: skip
    (row,) = metrics(tmp_path / "run")
    assert row["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("credit", [{"credit": "step"}, {"credit": "step", "gae_lambda": 1.0}, {"credit": "rollout"}])
def test_every_kind_of_credit_learns_and_differs_from_that_of_tokens(options, tmp_path, credit):
    for name, how in (("token", {}), ("other", credit)):
        train(out=tmp_path / name, iterations=25, kl_weight=0.0, **how, **options)
    token, other = (metrics(tmp_path / name) for name in ("token", "other"))
    assert sum(r["quality"] for r in other[-5:]) > sum(r["quality"] for r in other[:5])
    assert token[0]["quality"] == other[0]["quality"] and token[0]["grad_norm"] != other[0]["grad_norm"]


def test_the_first_tokens_can_have_the_credit_of_the_rollout_too(options, tmp_path):
    for name, how in (("none", {}), ("zero", {"early_credit": 0.0}), ("some", {"early_credit": 2.0})):
        train(out=tmp_path / name, iterations=25, kl_weight=0.0, **how, **options)
    none, zero, some = (metrics(tmp_path / name) for name in ("none", "zero", "some"))
    assert none[0]["grad_norm"] == zero[0]["grad_norm"] != some[0]["grad_norm"]
    assert sum(r["quality"] for r in some[-5:]) > sum(r["quality"] for r in some[:5])


def test_early_credit_beside_another_credit_than_that_of_tokens_is_said_to_do_nothing(options, tmp_path, capsys):
    for credit, idle in ((None, False), ("step", True), ("rollout", True)):
        train(out=tmp_path / f"run-{credit}", iterations=1, credit=credit, early_credit=2.0, **options)
        assert ("it does nothing" in capsys.readouterr().out) == idle


def test_early_credit_wants_few_steps_held_firmly_and_says_so():
    settings = {"credit": "token", "early_credit": 2.0, "kl": "ce", "kl_weight": 0.2, "kl_falloff": 2.0,
                "shared_steps": True, "steps_reward": 0.5, "quality_gate": 0.1}  # fmt: skip
    for how, steps, warned in (
        ({}, "4", True), ({}, "2-16", True), ({}, "auto", True), ({}, "16", False), ({"early_credit": 0.0}, "4", False),
        ({"kl_falloff": 0.0}, "4", False), ({"kl_falloff": 0.0, "kl": "none"}, "4", True),
        ({"kl_falloff": 0.0, "kl_weight": 0.002}, "4", True), ({"credit": "rollout"}, "16", True),
    ):  # fmt: skip
        assert bool(doubtful(settings | how, step_range(steps))) == warned, (how, steps)


def test_a_number_of_steps_is_held_alike_alone_and_by_an_equal_weight_of_all(options, tmp_path):
    options |= {"reference_guidance": 3.0, "iterations": 1, "steps": "4"}
    norms = {}
    for weight, falloff in ((32.0, 2.0), (2.0, 0.0), (32.0, 0.0)):  # 32 x (4 / 16)^2 = 2
        train(out=tmp_path / f"{weight}-{falloff}", kl_weight=weight, kl_falloff=falloff, **options)
        norms[weight, falloff] = metrics(tmp_path / f"{weight}-{falloff}")[0]["grad_norm"]
    assert norms[32.0, 2.0] == norms[2.0, 0.0] < norms[32.0, 0.0]


def test_a_reward_without_a_gradient_trains_by_the_credit_of_steps(options, tmp_path):
    train(out=tmp_path / "run", iterations=1, **options | {"quality": "tests.test_train:flat"})
    settings = json.loads((tmp_path / "run/checkpoints/000001/state.json").read_text(encoding="utf-8"))["settings"]
    assert settings["credit"] == "step"
    train(out=tmp_path / "other", iterations=1, **options)
    assert (
        json.loads((tmp_path / "other/checkpoints/000001/state.json").read_text(encoding="utf-8"))["settings"]["credit"]
        == "token"
    )


def test_a_model_keeps_the_tuning_that_was_learned_and_goes_on_from_it(options, tmp_path):
    trained = train(out=tmp_path / "run", iterations=3, **options)
    table = load_generator(trained).tuning
    assert table[:2].any() and not table[3:].any()  # 3 steps are between 2 and 4
    last = metrics(tmp_path / "run")[-1]
    assert last["warp"] == pytest.approx(settled(table, torch.tensor([3])).warp.item())
    again = train(out=tmp_path / "again", iterations=1, tune=False, **options | {"model": str(trained)})
    assert torch.equal(load_generator(again).tuning, table)
    assert metrics(tmp_path / "again")[0]["ratio_max"] == pytest.approx(1, abs=1e-5)  # sampled by it, and scored so
    onwards = train(out=tmp_path / "run", iterations=4, resume=True, **options | {"tune": False})
    assert torch.equal(load_generator(onwards).tuning, table)
    plain = train(out=tmp_path / "plain", iterations=1, tune=False, **options)
    assert load_generator(plain).tuning is None and "warp" not in metrics(tmp_path / "plain")[0]


def test_a_policy_without_guidance_is_drawn_to_the_guided_reference(options, tmp_path):
    train(out=tmp_path / "run", iterations=15, kl_weight=30.0, reference_guidance=3.0, warmup=0, **options)
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl"] > 1e-4
    assert sum(row["kl"] for row in rows[-3:]) < sum(row["kl"] for row in rows[:3]) / 2


def test_a_model_keeps_the_schedule_and_the_order_that_it_was_trained_with(options, tmp_path):
    trained = train(
        out=tmp_path / "run", iterations=1, likelihood="exact", order="halton", schedule="arccos", **options
    )
    (row,) = metrics(tmp_path / "run")
    assert row["ratio_max"] == pytest.approx(1, abs=1e-5) and row["grad_norm"] > 0
    assert (load_generator(trained).order, load_generator(trained).schedule) == ("halton", "arccos")


def test_micro_batches_do_not_change_the_update(options, tmp_path):
    for size in (3, 8):
        train(out=tmp_path / str(size), iterations=1, micro_batch=size, percentile=50.0,
              **options | {"steps": "2-4", "lr": 1e-4})  # fmt: skip
    one, other = weights(tmp_path / "3"), weights(tmp_path / "8")
    # an update is about lr: Adam makes much of a gradient that is nearly 0, whichever sign rounding gave it
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_the_learning_rate_rises_over_the_first_iterations(options, tmp_path):
    before = load_file(options["model"] + "/transformer/diffusion_pytorch_model.safetensors")
    moved = {}
    for warmup in (0, 9):
        train(out=tmp_path / str(warmup), iterations=1, warmup=warmup, ema=0.0, **options)
        after = weights(tmp_path / str(warmup))
        moved[warmup] = max((after[name] - before[name]).abs().max().item() for name in before)
    assert moved[0] == pytest.approx(options["lr"], rel=0.05)  # Adam's first update
    assert moved[9] == pytest.approx(options["lr"] / 10, rel=0.05)


def test_checkpointing_does_not_change_the_update(options, tmp_path):
    for on in (False, True):
        train(out=tmp_path / str(on), iterations=1, checkpointing=on, **options)
    one, other = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_resuming_equals_the_uninterrupted_run(options, tmp_path):
    train(out=tmp_path / "whole", iterations=4, updates=2, trained=2, **options)
    train(out=tmp_path / "parts", iterations=2, updates=2, trained=2, **options)
    train(out=tmp_path / "parts", iterations=4, updates=2, trained=2, resume=True, **options)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timeless = [[{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics(tmp_path / name)]
                for name in ("whole", "parts")]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_a_run_is_not_overwritten_and_a_damaged_checkpoint_is_named(options, tmp_path):
    train(out=tmp_path / "run", iterations=1, **options)
    with pytest.raises(ValueError, match="holds a run already"):
        train(out=tmp_path / "run", iterations=1, **options)
    checkpoint = tmp_path / "run/checkpoints/000001/tensors.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="000001 is damaged: tensors.safetensors has 1000 bytes"):
        train(out=tmp_path / "run", iterations=2, resume=True, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": "0"}, "at least 1"), ({"steps": "many"}, "a range or auto"), ({"steps": "99"}, "more than the 16"),
     ({"group_size": 1}, "group-size"), ({"lr": 0.0}, "lr"), ({"kl": "k9"}, "divergence"), ({"trained": 9}, "trained"),
     ({"iterations": 0}, "iterations"), ({"order": "best"}, "'best'"), ({"schedule": "cubic"}, "'cubic'"),
     ({"credit": "half"}, "step or rollout"), ({"gae_lambda": 1.5}, "gae-lambda"), ({"tune_rate": 0.0}, "tune-rate"),
     ({"early_credit": -1.0}, "early-credit"),
     ({"kl_falloff": -1.0}, "kl-falloff"),
     ({"credit": "step", "likelihood": "exact"}, "--credit rollout"),
     ({"credit": "token", "quality": "tests.test_train:flat"}, "no gradient at the pictures")],
)  # fmt: skip
def test_settings_that_cannot_work_are_named_before_anything_is_written(options, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(out=tmp_path / "run", **options | change)
    assert not (tmp_path / "run").exists()


def test_step_ranges():
    assert step_range("8") == (8, 8, False) and step_range("2-16") == (2, 16, False)
    assert step_range("auto:4") == (1, 4, True) and step_range("auto") == (1, 8, True)
    assert step_range("auto", at_most=5).most == 5
    with pytest.raises(ValueError, match="must rise"):
        step_range("9-3")
    for wrong in ("auto:", "auto:2-4", "autos", "auto:x", "2-"):
        with pytest.raises(ValueError, match="range or auto"):
            step_range(wrong)
    with pytest.raises(ValueError, match="at least 1"):
        step_range("auto:0")


def test_a_subset_of_steps_has_the_asked_size_and_every_step_its_turn():
    steps = torch.tensor([2, 4, 6]).repeat(400)
    which = trained_steps(steps, 2, torch.Generator().manual_seed(0))
    assert (which.sum(-1) == 2).all()
    assert not which[steps == 2][:, 2:].any()
    share = which[steps == 4][:, :4].float().mean(0)
    assert torch.allclose(share, torch.full((4,), 0.5), atol=0.1)


def test_report_compares_the_trained_model_with_its_base(options, tmp_path):
    from speedrl.evaluation.reports import report

    trained = train(out=tmp_path / "run", iterations=1, **options)
    rows = report(options["model"], trained, out=tmp_path / "run", prompts=options["prompts"],
                  quality=options["quality"], count=2, seeds=2)  # fmt: skip
    assert json.loads((tmp_path / "run/comparison.json").read_text(encoding="utf-8")) == rows
    assert [row["network_calls"] for row in rows] == [12, 6, 3, 6, 3, 3]  # 6 guided steps before, 3 plain after
    assert all(row["reward"] is not None and row["reward_spread"] is not None for row in rows)
    assert (tmp_path / "run/before_after.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_the_base_with_the_trained_models_revision_where_there_are_steps_for_it(options, tmp_path):
    from speedrl.evaluation.reports import report

    base = options["model"]
    for share, calls in ((0.5, [8]), (0.0, [])):
        trained = train(out=tmp_path / "run", iterations=1, revise=share, **options | {"steps": "8"})
        rows = report(base, trained, out=tmp_path / "run", prompts=options["prompts"], quality=options["quality"],
                      count=2, seeds=1)  # fmt: skip
        assert [row["network_calls"] for row in rows if row["model"] == f"{base}, revised"] == calls
        shutil.rmtree(tmp_path / "run")


@pytest.fixture
def with_lora(options, tmp_path):
    """A short run that trained an adapter and merged it as well."""
    train(out=tmp_path / "run", iterations=3, lora=2, merge=True, reference_guidance=1.0, **options | {"lr": 3e-2})
    return tmp_path / "run"


def test_an_adapter_starts_as_nothing_and_is_all_that_trains(options, with_lora):
    first, *_, last = metrics(with_lora)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert last["kl"] > 1e-4, "the reference is the base under the adapter"
    held = {name for name in load_file(with_lora / "checkpoints/000003/tensors.safetensors")}
    assert held and all(".lora_" in name for name in held)


def test_a_run_with_an_adapter_is_a_model_and_equals_the_merged_one(options, with_lora, tmp_path):
    shutil.copytree(with_lora / "adapter", tmp_path / "alone/adapter")
    found, merged = load_generator(tmp_path / "alone"), load_generator(with_lora)
    assert (found.steps, found.guidance) == (merged.steps, merged.guidance) == (3, 1.0)
    states = [generator.transformer.state_dict() for generator in (load_generator(options["model"]), found, merged)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(torch.allclose(states[1][name], states[2][name], atol=1e-6) for name in states[0])
    changed = {name for name in states[0] if not torch.allclose(states[0][name], states[1][name])}
    assert changed and all(states[0][name].ndim == 2 for name in changed)


def test_an_adapter_keeps_the_size_and_the_text_encoder_that_it_was_trained_with(options, tmp_path):
    text = shutil.copytree(f"{options['model']}/text_encoder", tmp_path / "text")
    state = {name: value * 1.5 for name, value in load_file(text / "model.safetensors").items()}
    save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    how = {"size": (16, 32), "text_encoder": text}
    train(out=tmp_path / "run", iterations=1, lora=2, loading=how, **options)
    again = load_generator(tmp_path / "run")
    assert again.size == (16, 32) and again.micro_conds == (32, 16, 0, 0, 6)
    wanted = encode_prompts(load_generator(options["model"], **how), ["an owl"])
    assert torch.equal(encode_prompts(again, ["an owl"]).text, wanted.text)


def test_peft_itself_reads_the_adapter(options, with_lora):
    from peft import LoraConfig, PeftModel

    model = load_generator(options["model"])
    wanted = load_generator(with_lora).transformer
    inputs = (torch.randint(32, (2, 4, 4)), torch.tensor([2, 1]), torch.randn(2, 8, 24), torch.randn(2, 32),
              torch.tensor([[16.0, 16, 0, 0, 6]]).expand(2, -1))  # fmt: skip
    loaded = PeftModel.from_pretrained(model.transformer, str(with_lora / "adapter"))
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(loaded(*inputs), wanted(*inputs), atol=1e-5, rtol=1e-5)


def test_a_resumed_adapter_equals_the_uninterrupted_one(options, tmp_path):
    options |= {"lora": 2, "seed": 5}
    train(out=tmp_path / "whole", iterations=3, **options)
    train(out=tmp_path / "parts", iterations=2, **options)
    train(out=tmp_path / "parts", iterations=3, resume=True, **options)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_adapter_and_one_on_top_of_another_are_refused(options, with_lora, tmp_path):
    shutil.copytree(with_lora / "adapter", tmp_path / "bad/adapter")
    with pytest.raises(ValueError, match="is an adapter already"):
        train(out=tmp_path / "next", lora=2, **options | {"model": str(tmp_path / "bad")})
    (tmp_path / "bad/adapter/adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged or another model's adapter"):
        load_generator(tmp_path / "bad")
    with pytest.raises(ValueError, match="rank of at least 1"):
        train(out=tmp_path / "none", lora=0, **options)
