"""Training on a tiny generator: what moves the policy and the step policy, what is refused, and what a fault says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import speedrl.generation
import speedrl.training
from speedrl.cli import app
from speedrl.learner import draw_prompts
from speedrl.method.scoring import trained_steps
from speedrl.models.loading import load_generator
from speedrl.training import train


def red(images, prompts):
    """A reward that a tiny generator can raise: how red an image is."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def blue(images, prompts):
    return -red(images, prompts)


def constant(images, prompts):
    return torch.zeros(len(images))


def by_chance(images, prompts):
    """Between 0 and 1, whatever is drawn in however many steps, but another value for each image."""
    return (images.double().sum((1, 2, 3)) * 1e4).frac().abs().float()


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\ne f\n", encoding="utf-8")
    return dict(model=str(tiny_generator_folder), prompts=str(prompts), quality="tests.test_train:red", steps="3",
                groups=2, group_size=4, search=0, compile=False, bf16=False, lr=3e-3, hindsight=0.0)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def held(folder, iteration):
    return load_file(folder / f"checkpoints/{iteration:06d}/tensors.safetensors")


def differ(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_by_default_group_advantages_reach_the_weights_and_the_step_policy(options, tmp_path, monkeypatch):
    """The default configuration but for the model, its prompts and its reward."""
    seen, plain = [], speedrl.training.policy_loss

    def spy(ratio, advantages, weights, **how):
        loss, stats = plain(ratio, advantages, weights, **how)
        (slope,) = torch.autograd.grad(loss, ratio, retain_graph=True)
        seen.append((advantages.detach(), slope, weights.detach()))
        return loss, stats

    monkeypatch.setattr(speedrl.training, "policy_loss", spy)
    given = {name: options[name] for name in ("model", "prompts", "bf16", "compile", "search")}
    for name in ("red", "blue"):
        train(out=tmp_path / name, iterations=2, groups=4, group_size=8, save_every=1,
              quality=f"tests.test_train:{name}", **given)
        advantages = torch.cat([part[0] for part in seen])
        assert advantages.abs().max() > 0.5 and advantages.min() < 0 < advantages.max()
        assert any((slope[weights > 0] != 0).any() for _, slope, weights in seen)
        seen.clear()
    one, other = metrics(tmp_path / "red"), metrics(tmp_path / "blue")
    assert one[0]["steps"] == other[0]["steps"] and one[0]["quality"] == pytest.approx(-other[0]["quality"])
    assert one[0]["grad_norm"] > 0 and one[0]["kept"] > 0
    first, second = held(tmp_path / "red", 1), held(tmp_path / "blue", 1)
    moved = {name for name in differ(first, second) if name.startswith("transformer.")}
    assert "transformer.steps.bias" in moved and len(moved) > 10
    assert first["transformer.steps.bias"].abs().max() > 0, "the step policy starts at 0"
    assert first["transformer.steps.weight"].abs().max() > 0
    base = load_generator(options["model"]).transformer.state_dict()
    now = load_generator(tmp_path / "red").transformer.state_dict()
    assert not all(torch.equal(base[name], now[name]) for name in base)


@pytest.mark.parametrize("given", [{}, {"steps_reward": 0.5}], ids=["default", "given"])
def test_rewards_of_the_run_are_quality_plus_speed_in_units_of_the_gap(options, tmp_path, monkeypatch, given):
    taken = []
    plain = speedrl.training.speed_reward
    monkeypatch.setattr(speedrl.training, "speed_reward",
                        lambda steps, *, max_steps: taken.append(steps) or plain(steps, max_steps=max_steps))
    train(out=tmp_path / "run", iterations=1, **given, **options | {"steps": "1-8"})
    (row,), (steps,) = metrics(tmp_path / "run"), taken
    assert row["steps"] == steps.float().mean()
    gap = json.loads((tmp_path / "run/checkpoints/000001/state.json").read_text(encoding="utf-8"))["gap"]
    speed = 0.5 * gap * (1 - steps.float().log2().mean().item() / 3)
    assert speed > 0 and row["reward"] - row["quality"] == pytest.approx(speed, rel=1e-3, abs=1e-7)


def test_the_kept_advantages_of_each_group_and_count_sum_to_zero(options, tmp_path, monkeypatch):
    """What the filters leave out does not tilt the advantages of the rest, which would push all tokens one way."""
    seen, plain = [], speedrl.training.grpo_loss

    def spy(policy, reference, trajectory, advantages, keep, trained, **how):
        seen.append((trajectory.steps.view(4, 8), advantages.view(4, 8), keep.view(4, 8)))
        return plain(policy, reference, trajectory, advantages, keep, trained, **how)

    monkeypatch.setattr(speedrl.training, "grpo_loss", spy)
    options |= {"steps": "2-4", "groups": 4, "group_size": 8, "percentile": 25.0, "min_quality": -0.5}
    train(out=tmp_path / "run", iterations=3, micro_batch=32, **options)
    for (steps, advantages, keep), row in zip(seen, metrics(tmp_path / "run"), strict=True):
        assert 0 < row["kept"] < 1 and row["kept"] == (keep > 0).float().mean()
        assert keep.sum().item() == pytest.approx(32), "the kept samples count for all"
        assert not advantages[keep == 0].any() and advantages.abs().max() > 0.5
        for count in (2, 4):
            sums = (advantages * (steps == count)).sum(1)
            torch.testing.assert_close(sums, torch.zeros(4), atol=1e-5, rtol=0)


def trained_counts(out, options, **more):
    """The mean step counts of the first and the last three iterations."""
    options = options | {"steps": "1-8", "groups": 4, "group_size": 8, "iterations": 12, "kl_weight": 0.0, "lr": 1e-4}
    train(out=out, steps_lr=0.3, save_every=100, **options | more)
    rows = metrics(out)
    return rows[0]["steps"], sum(row["steps"] for row in rows[-3:]) / 3


def test_where_quality_does_not_depend_on_steps_a_large_speed_reward_makes_them_few(options, tmp_path):
    first, last = trained_counts(tmp_path / "run", options, quality="tests.test_train:by_chance", steps_reward=20.0)
    assert first > 1.8 and last < 1.5


def test_where_quality_grows_with_steps_and_speed_earns_nothing_they_become_many(options, tmp_path, monkeypatch):
    taken = {}
    for module in (speedrl.training, speedrl.generation):

        def noting(policy, steps, *arguments, plain=module.rollout, **how):
            taken["steps"] = steps
            return plain(policy, steps, *arguments, **how)

        monkeypatch.setattr(module, "rollout", noting)

    def grows(images, prompts):
        return by_chance(images, prompts) / 8 + (taken["steps"][: len(images)] / 8 if taken else 0)

    first, last = trained_counts(tmp_path / "run", options, quality=grows, steps_reward=0.0)
    assert first < 5 and last > 6


def test_reward_rises_and_the_model_is_saved_in_the_layout_it_came_in(options, tmp_path):
    saved = train(out=tmp_path / "run", iterations=25, **options | {"kl_weight": 0.0, "group_size": 8})
    rows = metrics(tmp_path / "run")
    assert len(rows) == 25
    assert sum(r["quality"] for r in rows[-5:]) > sum(r["quality"] for r in rows[:5])
    assert load_generator(saved).grid == load_generator(options["model"]).grid


@pytest.mark.parametrize("likelihood", ["token", "exact"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_ratio_is_one_and_kl_zero_before_the_first_update(options, tmp_path, likelihood, guidance):
    train(out=tmp_path / "run", iterations=1, likelihood=likelihood, guidance=guidance, reference_guidance=guidance,
          **options | {"steps": "2-8"})
    (row,) = metrics(tmp_path / "run")
    assert row["ratio_max"] == 1 and row["clip_fraction"] == row["approx_kl"] == 0
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["mismatch"] < 1e-5, "training computes the log-probabilities that the rollout recorded"


def test_in_bf16_the_ratio_is_one_and_the_mismatch_is_logged(options, tmp_path, monkeypatch):
    """Rounding of the rollout, multiplied by guidance, does not clip."""
    plain = speedrl.training.rollout

    def rounded(*arguments, **how):
        found = plain(*arguments, **how)
        random = torch.Generator().manual_seed(0)
        found.log_probs.add_(0.5 * torch.randn(found.log_probs.shape, generator=random) * found.masked)
        return found

    monkeypatch.setattr(speedrl.training, "rollout", rounded)
    train(out=tmp_path / "run", iterations=1, **options)
    (row,) = metrics(tmp_path / "run")
    assert row["ratio_max"] == 1 and row["clip_fraction"] == 0 and row["grad_norm"] > 0
    assert row["mismatch"] == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, rel=0.2)  # the mean of |normal|


def test_hindsight_brings_the_policy_to_what_the_reference_says_of_its_images(options, tmp_path):
    """Without a reward and without the divergence: the dense reward alone trains."""
    options |= {"quality": "none", "kl_weight": 0.0, "guidance": 1.0}
    more = {"hindsight": 1.0, "reference_guidance": 3.0, "warmup": 0}
    train(out=tmp_path / "run", iterations=15, **options | more)
    rows = metrics(tmp_path / "run")
    assert all(row["quality"] == row["kl"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert sum(row["hindsight"] for row in rows[-3:]) < sum(row["hindsight"] for row in rows[:3]) * 0.8
    train(out=tmp_path / "without", iterations=1, **options | {"kl_weight": 0.1})
    assert "hindsight" not in metrics(tmp_path / "without")[0]


def test_a_run_with_hindsight_hides_the_same_tokens_again_when_it_is_resumed(options, tmp_path):
    options |= {"hindsight": 0.5, "hindsight_share": 0.5, "save_every": 1}
    train(out=tmp_path / "whole", iterations=3, **options)
    train(out=tmp_path / "parts", iterations=2, **options)
    train(out=tmp_path / "parts", iterations=3, resume=True, **options)
    assert not differ(held(tmp_path / "whole", 3), held(tmp_path / "parts", 3))


def test_more_updates_of_a_rollout_are_clipped(options, tmp_path):
    train(out=tmp_path / "run", iterations=2, updates=4, clip_range=1e-3, warmup=0, **options)
    assert max(row["clip_fraction"] for row in metrics(tmp_path / "run")) > 0


def test_a_policy_without_guidance_is_drawn_to_the_guided_reference_also_without_a_reward(options, tmp_path):
    options |= {"quality": "none", "guidance": 1.0}
    train(out=tmp_path / "run", iterations=15, kl_weight=30.0, reference_guidance=3.0, warmup=0, **options)
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl"] > 1e-4 and all(row["quality"] == 0 for row in rows)
    assert sum(row["kl"] for row in rows[-3:]) < sum(row["kl"] for row in rows[:3]) / 2


def test_micro_batches_do_not_change_the_update(options, tmp_path):
    for size in (3, 8):
        train(out=tmp_path / str(size), iterations=1, micro_batch=size, **options | {"steps": "2-8"})
    one, other = held(tmp_path / "3", 1), held(tmp_path / "8", 1)
    gradients = [name for name in one if name.startswith("optimizer.exp_avg.")]
    assert gradients and all(torch.allclose(one[name], other[name], atol=1e-6) for name in gradients)


def test_the_learning_rate_of_the_policy_warms_up_and_that_of_the_step_policy_stays(options, tmp_path):
    options |= {"steps": "2-8", "ema": 0.0, "iterations": 1}
    base = load_generator(options["model"]).transformer.state_dict()
    moved = {}
    for warmup in (0, 9):
        train(out=tmp_path / str(warmup), warmup=warmup, **options)
        now = held(tmp_path / str(warmup), 1)
        moved[warmup] = max((now[f"transformer.{name}"] - base[name]).abs().max().item() for name in base
                            if f"transformer.{name}" in now)
        away = now["transformer.steps.bias"] + torch.tensor([2.0, 4.0, 8.0]).log()
        assert away.abs().max().item() == pytest.approx(0.1, rel=0.05)  # Adam's first
    assert moved[0] == pytest.approx(options["lr"], rel=0.05)
    assert moved[9] == pytest.approx(options["lr"] / 10, rel=0.05)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": "0"}, "`steps` must be at least 1"), ({"steps": "99"}, "more than the 16"),
        ({"group_size": 1}, "`group_size` must be at least 2, got 1"), ({"lr": 0.0}, "`lr` must be above 0, got 0"),
        ({"lr": float("nan")}, "`lr` must be a finite number"), ({"min_quality": float("inf")}, "`min_quality`"),
        ({"kl": "k9"}, "`kl` must be ce, reverse, k2, k3, got 'k9'"), ({"kl": "k1"}, "`kl` must be"),
        ({"kl": "none"}, "`kl` must be"), ({"kl": "k3", "kl_weight": 0.0}, "`kl` has no effect at `kl_weight` 0"),
        ({"reference_guidance": 2.0, "kl_weight": 0.0},
         "`reference_guidance` has no effect at `kl_weight` 0 and `hindsight` 0"),
        ({"hindsight": -1.0}, "`hindsight` must be at least 0"),
        ({"hindsight_share": 0.0, "hindsight": 1.0}, "`hindsight_share` must be above 0 and at most 1"),
        ({"hindsight_share": 1.5, "hindsight": 1.0}, "`hindsight_share` must be above 0 and at most 1"),
        ({"hindsight_share": 0.5}, "`hindsight_share` has no effect at `hindsight` 0"),
        ({"hindsight_share": 0.5, "hindsight": 1.0, "steps": "1"}, "`hindsight_share` has no effect with `steps` 1"),
        ({"iterations": 0}, "`iterations` 0 searches"), ({"order": "best"}, "`order` must be confidence"),
        ({"schedule": "cubic"}, "'cubic'"), ({"schedule": "power:0"}, "`schedule` power:X takes a positive"),
        ({"likelihood": "half"}, "`likelihood` must be token, sequence, exact"),
        ({"likelihood": "sequence"}, "`likelihood` sequence is the same as token with one update .* `updates` 2"),
        ({"clip_range": 0.1}, "`clip_range` 0.1 has no effect with one update"),
        ({"percentile": 12.0}, "`percentile` 12 drops none of 2 groups"),
        ({"percentile": 101.0}, "`percentile` must be at least 0 and at most 100"),
        ({"ema": 1.0}, "`ema` must be at least 0 and below 1"), ({"train_steps": 3}, "`train_steps` 3 has no effect"),
        ({"quality_gate": 0.5}, "`steps_reward` above 0"), ({"offload": True}, "`parallel` fsdp"),
        ({"remask": 0.5}, "from 6 steps on"), ({"guidance": 0.5}, "`guidance` must be at least 1"),
        ({"lora_alpha": 2.0}, "give its rank by `lora`"), ({"advantage_std": "all"}, "`advantage_std` must be group"),
        ({"search": -1}, "`search` must be at least 0"),
        ({"quality": "none", "search": 4}, "`search` needs a reward"),
        ({"trackers": ["paper"]}, "`trackers` must be tensorboard"),
        ({"groups": 2**20, "group_size": 2**12}, "`groups` times `group_size` is too many"),
        ({"groups": 1, "steps": "1-4"}, "`groups` must be at least 2"),
        ({"likelihood": "exact", "temperature": 0.0}, "`likelihood` exact does not exist at `temperature` 0"),
    ],
    ids=str,
)
def test_an_error_of_settings_names_the_arguments_and_nothing_is_written(options, tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as caught:
        train(out=tmp_path / "run", **options | change)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def refused(options, *more):
    flags = {"model": options["model"], "prompts": options["prompts"], "quality": options["quality"], "search": 0,
             "hindsight": 0}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    out = f"{options['prompts']}-run"
    result = CliRunner().invoke(app, ["train", "--no-compile", "--no-compare", "--out", out, *given, *more])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "8", "--steps-reward", "0.5"], ["--steps 8", "range, like 1-8", "--steps-reward 0"]),
        (["--quality", "none", "--guidance", "2", "--reference-guidance", "2"], ["--quality none", "equal guidance"]),
        (["--quality", "none", "--kl-weight", "0"], ["--quality none", "--kl-weight or --hindsight above 0"]),
        (["--kl", "none"], ["--kl must be ce, reverse, k2, k3", "'none'"]),
        (["--beta", "0", "--kl", "ce", "--reference-guidance", "2"], ["--reference-guidance", "--kl-weight 0"]),
        (["--likelihood", "sequence"], ["--likelihood sequence", "--updates 2 or more"]),
        (["--steps", "x"], ["--steps takes a number, a range or a list"]),
        (["--num-generations", "1"], ["--group-size must be at least 2"]),
        (["--quality", "none", "--steps-reward", "1"], ["--quality none", "--steps-reward 0"]),
        (["--likelihood", "exact", "--temperature", "0"],
         ["--likelihood exact", "--temperature above 0", "--likelihood token"]),
        (["--quality-gate", "0.1", "--steps-reward", "0"], ["--quality-gate", "--steps-reward above 0"]),
        (["--offload"], ["--offload", "--parallel fsdp"]),
    ],
)
def test_what_cannot_act_is_refused_in_one_line_that_says_what_to_do(options, flags, says):
    said = refused(options, *flags)
    assert all(text in said for text in says), said


def test_other_likelihoods_and_orders_train_at_temperature_0(options, tmp_path):
    train(out=tmp_path / "token", iterations=1, temperature=0.0, **options)
    train(out=tmp_path / "random", iterations=1, temperature=0.0, order="random", likelihood="exact", **options)
    assert metrics(tmp_path / "token")[0]["grad_norm"] > 0 and metrics(tmp_path / "random")[0]["grad_norm"] > 0


def test_a_constant_reward_warns_at_once_and_ends_after_five_iterations_with_advice(options, tmp_path, capsys):
    options |= {"quality": "tests.test_train:constant"}
    train(out=tmp_path / "short", iterations=1, **options)
    assert "--quality none" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="5 iterations .*constant.* `quality` none"):
        train(out=tmp_path / "run", iterations=9, **options)
    assert len(metrics(tmp_path / "run")) == 5


def after(iterations, out):
    """A reward that is NaN once the run has so many checkpoints."""

    def score(images, prompts):
        values = red(images, prompts)
        return (
            values * float("nan")
            if len(images) == 8 and len(list(out.glob("checkpoints/0*"))) >= iterations
            else values
        )

    return score


@pytest.mark.parametrize(
    ("iterations", "says"), [(0, "nothing was saved"), (2, "the checkpoint of iteration 2 stands")]
)
def test_a_reward_that_is_not_finite_says_what_is_saved(options, tmp_path, iterations, says):
    options |= {"quality": after(iterations, tmp_path / "run"), "save_every": 1, "iterations": 5}
    with pytest.raises((ValueError, OSError), match=says) as caught:
        train(out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value) and "nan" in str(caught.value)
    assert ("stands" in str(caught.value)) == (iterations > 0)


def test_prompts_may_be_a_list_and_quality_a_function(options, tmp_path):
    given = options | {"prompts": ["a b", "c d", "e f"], "quality": red}
    train(out=tmp_path / "python", iterations=2, **given)
    train(out=tmp_path / "files", iterations=2, **options)
    one, other = metrics(tmp_path / "python"), metrics(tmp_path / "files")
    assert [row["quality"] for row in one] == [row["quality"] for row in other]
    train(out=tmp_path / "python", iterations=3, **given | {"resume": True})


def test_checkpointing_recomputes_blocks_and_does_not_change_the_update(options, tmp_path):
    for on in (False, True):
        train(out=tmp_path / str(on), iterations=1, checkpointing=on, **options)
    one, other = held(tmp_path / "False", 1), held(tmp_path / "True", 1)
    gradients = [name for name in one if name.startswith("optimizer.exp_avg.")]
    assert gradients and all(torch.allclose(one[name], other[name], atol=1e-6) for name in gradients)


def test_a_run_is_not_overwritten_and_a_damaged_checkpoint_is_named(options, tmp_path):
    train(out=tmp_path / "run", iterations=1, **options)
    with pytest.raises(ValueError, match="holds a finished run"):
        train(out=tmp_path / "run", iterations=1, **options)
    checkpoint = tmp_path / "run/checkpoints/000001/tensors.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="000001 is damaged: tensors.safetensors has 1000 bytes"):
        train(out=tmp_path / "run", iterations=2, resume=True, **options)


def test_a_model_keeps_the_sampler_that_it_was_trained_with_and_the_search_goes_on_from_it(options, tmp_path):
    trained = train(out=tmp_path / "run", iterations=1, order="halton", schedule="arccos", **options | {"search": 2})
    generator = load_generator(trained)
    assert (generator.sampler.order, generator.sampler.schedule) == ("halton", "arccos")
    table = generator.sampler.scalars
    assert table.abs().max() > 0 and not generator.step_policy, "3 steps are fixed"
    again = train(out=tmp_path / "again", iterations=1, **options | {"model": str(trained)})
    assert torch.equal(load_generator(again).sampler.scalars, table)
    plain = train(out=tmp_path / "plain", iterations=1, **options)
    assert load_generator(plain).sampler.scalars is None


def test_a_subset_of_steps_has_the_asked_size_and_every_step_its_turn():
    steps = torch.tensor([2, 4, 6]).repeat(400)
    which = trained_steps(steps, 2, torch.Generator().manual_seed(0))
    assert (which.sum(-1) == 2).all()
    assert not which[steps == 2][:, 2:].any()
    share = which[steps == 4][:, :4].float().mean(0)
    assert torch.allclose(share, torch.full((4,), 0.5), atol=0.1)


def test_prompts_are_drawn_without_repetition_until_all_had_their_turn():
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw_prompts(3, 7, generator)) in [sorted([0, 1, 2] * 2 + [i]) for i in range(3)]
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:4].tolist()
    assert draw_prompts(50, 4, torch.Generator().manual_seed(1)) == expected


@pytest.fixture
def with_lora(options, tmp_path):
    """A short run that trained an adapter."""
    train(out=tmp_path / "run", iterations=3, lora=2, reference_guidance=3.0, **options | {"lr": 3e-2})
    return tmp_path / "run"


def test_an_adapter_starts_as_nothing_and_is_all_that_trains(with_lora):
    first, *_, last = metrics(with_lora)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert last["kl"] > 1e-6, "the reference is the base under the adapter"
    names = held(with_lora, 3)
    assert names and all(".lora_" in name for name in names)


def test_an_adapter_alone_is_a_model(options, with_lora, tmp_path):
    shutil.copytree(with_lora / "adapter", tmp_path / "alone/adapter")
    found, base = load_generator(tmp_path / "alone"), load_generator(options["model"])
    states = [generator.transformer.state_dict() for generator in (base, found)]
    changed = {name for name in states[0] if not torch.allclose(states[0][name], states[1][name])}
    assert changed and all(states[0][name].ndim == 2 for name in changed)


def test_peft_itself_reads_the_adapter(options, with_lora):
    from peft import LoraConfig, PeftModel

    model = load_generator(options["model"])
    wanted = load_generator(with_lora).transformer
    inputs = (torch.randint(32, (2, 4, 4)), torch.tensor([2, 1]), torch.randn(2, 8, 24), torch.randn(2, 32),
              torch.tensor([[16.0, 16, 0, 0, 6]]).expand(2, -1))
    loaded = PeftModel.from_pretrained(model.transformer, str(with_lora / "adapter"))
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(loaded(*inputs), wanted(*inputs), atol=1e-5, rtol=1e-5)


def test_a_damaged_adapter_and_one_on_top_of_another_are_refused(options, with_lora, tmp_path):
    shutil.copytree(with_lora / "adapter", tmp_path / "bad/adapter")
    with pytest.raises(ValueError, match="is an adapter already"):
        train(out=tmp_path / "next", lora=2, **options | {"model": str(tmp_path / "bad")})
    (tmp_path / "bad/adapter/adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged or another model's adapter"):
        load_generator(tmp_path / "bad")
    with pytest.raises(ValueError, match="`lora` must be at least 1"):
        train(out=tmp_path / "none", lora=0, **options)


def test_with_remasking_the_ratio_is_one_too(options, tmp_path):
    train(out=tmp_path / "run", iterations=1, remask=0.5, **options | {"steps": "6-8"})
    row = metrics(tmp_path / "run")[0]
    assert row["ratio_max"] == 1 and row["mismatch"] < 1e-5
