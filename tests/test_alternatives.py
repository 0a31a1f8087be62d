"""Fine-tuning and distillation: their losses by autograd and enumeration, and that they learn on a tiny generator."""

import json
import shlex

import pytest
import torch
import typer
from typer.testing import CliRunner

from experiments.alternatives.distil import auxiliary_loss, distil, divergence_gradient, student_loss
from experiments.alternatives.finetune import best_of, finetune, finetune_loss
from experiments.alternatives.shared import mask_again
from speedrl.cli import in_one_line
from speedrl.models.loading import load_generator
from speedrl.studies.runs import command


def random_logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2])
def test_divergence_gradient_is_that_of_autograd(beta):
    teacher, auxiliary = random_logits(3, 5, seed=0), random_logits(3, 5, seed=1).requires_grad_()
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (teacher, auxiliary))
    kl = torch.distributions.kl_divergence
    (expected,) = torch.autograd.grad(((1 - beta) * kl(p, q) + beta * kl(q, p)).sum(), auxiliary)
    found = divergence_gradient(teacher, auxiliary.detach(), beta=beta)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.zeros(3), atol=1e-6, rtol=0)
    assert divergence_gradient(teacher, teacher, beta=beta).abs().max() < 1e-6


def test_student_loss_has_the_given_gradient_at_masked_positions_only():
    logits, gradient = random_logits(2, 3, 4, seed=0).requires_grad_(), random_logits(2, 3, 4, seed=1)
    masked = torch.tensor([[True, False, True], [False, False, True]])
    (found,) = torch.autograd.grad(student_loss(logits, gradient, masked), logits)
    torch.testing.assert_close(found, gradient * masked[..., None] / 3)


def test_auxiliary_loss_is_the_expected_cross_entropy_of_the_drawn_tokens():
    logits, student = random_logits(1, 2, 3, seed=0), random_logits(1, 2, 3, seed=1)
    masked, p, log_q = torch.tensor([[True, False]]), student.softmax(-1), logits.log_softmax(-1)
    expected = -sum(p[0, 0, x] * log_q[0, 0, x] for x in range(3))
    torch.testing.assert_close(auxiliary_loss(logits, student, masked), expected)


def test_images_are_masked_again_as_the_teachers_steps_would():
    tokens = torch.arange(64).expand(500, -1)
    state, masked, timestep = mask_again(tokens, 8, torch.Generator().manual_seed(0), mask_id=99)
    assert torch.equal(state == 99, masked) and torch.equal(state[~masked], tokens[~masked])
    assert masked.sum(1).min() >= 1 and masked.float().mean() == pytest.approx(2 / torch.pi, abs=0.03)
    assert set(timestep.tolist()) == set(range(8))
    first = masked[timestep == 7].float().mean()
    assert first > 0.97 and masked[timestep == 0].float().mean() < 0.25, "the timestep is high where much is masked"


def test_states_are_masked_for_the_steps_of_each_sample():
    tokens, steps = torch.zeros(400, 16, dtype=torch.int64), torch.arange(1, 5).repeat(100)
    state, _, timestep = mask_again(tokens, steps, torch.Generator().manual_seed(0), mask_id=9)
    assert (timestep >= 0).all() and (timestep < steps).all()
    assert all(set(timestep[steps == n].tolist()) == set(range(n)) for n in range(1, 5))
    assert (state[(steps == 4) & (timestep == 3)] == 9).float().mean() > 0.95


def test_finetune_loss_is_the_cross_entropy_at_what_is_masked():
    logits, targets = random_logits(1, 3, 4, seed=0), torch.tensor([[0, 1, 3]])
    found = finetune_loss(logits, targets, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits[0, 1:], targets[0, 1:]))


@pytest.fixture
def options(tiny_generator_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\nc d\n", encoding="utf-8")
    score = "def score(images, prompts):\n    return images.mean((1, 2, 3)).float()\n"
    (tmp_path / "brightness.py").write_text(score, encoding="utf-8")
    return dict(
        model=str(tiny_generator_folder), prompts=str(tmp_path / "prompts.txt"), images=8, lr=3e-3, compile=False
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_best_image_of_each_prompt_is_kept():
    tokens = torch.arange(12).view(6, 2)
    assert best_of(tokens, torch.tensor([0.1, 0.3, 0.2, 9.0, 1.0, -1.0]), 3).tolist() == [[2, 3], [6, 7]]
    assert torch.equal(best_of(tokens, torch.zeros(6), 1), tokens)


def test_fine_tuning_learns_its_best_images_and_saves_a_model_of_few_steps(options, tmp_path):
    own = options | {"steps": "2-3", "quality": f"{tmp_path / 'brightness.py'}:score"}
    model = finetune(out=tmp_path / "a", iterations=12, n=2, **own)
    losses = [row["loss"] for row in rows(tmp_path / "a")]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    found = load_generator(model)
    assert (found.steps, found.sampler.guidance) == (3, 1.0)
    budget = json.loads((tmp_path / "a/budget.json").read_text(encoding="utf-8"))
    assert budget["images"] == 96 and budget["network_evaluations"] == 96 * 12 + 48
    with pytest.raises(ValueError, match="--n must divide --images, got 3 and 8"):
        finetune(out=tmp_path / "b", n=3, **own)


@pytest.mark.parametrize("train", [finetune, distil])
def test_the_command_that_a_report_prints_trains_and_tells_errors_in_one_line(train, options, tmp_path):
    app = typer.Typer()
    app.command()(in_one_line(train))
    given = options | {"out": tmp_path / "a", "iterations": 1}
    _, _, *flags = shlex.split(command(train.__name__, given))
    assert CliRunner().invoke(app, flags).exit_code == 0
    assert load_generator(tmp_path / "a/model").sampler.guidance == 1.0
    wrong = CliRunner().invoke(app, [*flags, "--prompts", "nowhere.txt"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: nowhere.txt") and wrong.stderr.count("\n") == 1


def test_distillation_saves_a_model_of_one_step_that_follows_its_teacher(options, tmp_path):
    model = distil(out=tmp_path / "a", iterations=15, **options)
    found = load_generator(model)
    assert (found.steps, found.sampler.guidance) == (1, 1.0)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows(tmp_path / "a"))
    assert json.loads((tmp_path / "a/budget.json").read_text(encoding="utf-8"))["images"] == 120


@pytest.mark.parametrize("beta", [0.0, -0.2])
def test_a_student_that_follows_the_gradients_ends_at_its_teacher(beta):
    """Positions that depend on nothing: there the auxiliary model can know the student exactly."""
    teacher = random_logits(1, 2, 4, seed=0) * 2
    student, auxiliary = (random_logits(1, 2, 4, seed=s).requires_grad_() for s in (1, 2))
    optimizer = torch.optim.Adam([student], lr=0.02)
    own = torch.optim.Adam([auxiliary], lr=0.1)
    masked = torch.ones(1, 2, dtype=torch.bool)
    for _ in range(1000):
        for loss, which in (
            (auxiliary_loss(auxiliary, student, masked), own),
            (student_loss(student, divergence_gradient(teacher, auxiliary, beta=beta), masked), optimizer),
        ):
            which.zero_grad()
            loss.backward()
            which.step()
    torch.testing.assert_close(student.softmax(-1), teacher.softmax(-1), atol=0.02, rtol=0)
