"""torch.compile with inductor on the default path: the same training as without it, and nothing compiled twice."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from speedrl.run.session import Run
from speedrl.system.platform import can_compile
from speedrl.training import train
from tests.test_train import metrics

pytestmark = pytest.mark.skipif(not can_compile("cpu"), reason="there is no compiler")


def test_compiled_training_is_eager_training_and_compiles_in_the_first_iteration_only(
    tiny_generator_folder, tmp_path, monkeypatch
):
    graphs, plain = [], Run.log

    def log(self, row):
        graphs.append(counters["stats"]["unique_graphs"])
        plain(self, row)

    monkeypatch.setattr(Run, "log", log)
    torch._dynamo.reset()
    counters.clear()
    model = str(tiny_generator_folder)
    options = dict(model=model, prompts=["a b", "c d", "e f"], quality="tests.test_train:red",
                   steps="1-8", steps_reward=0.5, groups=4, group_size=4, bf16=False, search=0,
                   save_every=1)
    train(out=tmp_path / "compiled", iterations=4, compile=True, **options)
    compiled = list(graphs)
    assert compiled[0] > 3, "blocks, what surrounds them, the sampler's step and the score"
    assert compiled[1:] == compiled[:1] * 3, f"compiled again after the first iteration: {compiled}"
    train(out=tmp_path / "eager", iterations=2, compile=False, **options)
    for one, other in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=False):
        for name in one.keys() - {"images_per_second", "compile_seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    first, second = (
        load_file(tmp_path / name / "checkpoints/000002/tensors.safetensors") for name in ("compiled", "eager")
    )
    for name in first:
        if name.startswith("optimizer.exp_avg."):
            torch.testing.assert_close(
                first[name], second[name], rtol=1e-2, atol=1e-4 * second[name].abs().max().item()
            )
