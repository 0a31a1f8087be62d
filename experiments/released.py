"""What a model of the released size takes here: `python -m experiments.released` draws with random weights.

Makes a checkpoint in Meissonic's layout at the released configuration (1,006,946,304 parameters in the transformer,
CLIP ViT-H's text half, aMUSEd's VQ) with random weights, draws one image from it with the `speedrl` command, and
prints the time and the most memory that took. `--blocks 2` keeps that many double and single blocks, `--train` adds a
training step.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from speedrl.cli import in_one_line
from speedrl.method.sampler import Sampler
from speedrl.models.generator import Generator
from speedrl.models.loading import save_generator
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.models.sources import find
from speedrl.system.platform import import_torchvision

VQ = dict(
    down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5, layers_per_block=2,
    block_out_channels=(128, 256, 256, 512, 768), latent_channels=64, sample_size=32, num_vq_embeddings=8192,
    vq_embed_dim=64, norm_num_groups=32, mid_block_add_attention=False, lookup_from_codebook=True, force_upcast=True,
)
TEXT = dict(
    vocab_size=49408, hidden_size=1024, intermediate_size=4096, projection_dim=1024, num_hidden_layers=24,
    num_attention_heads=16, max_position_embeddings=77, hidden_act="gelu",
)
# mean brightness: a reward that costs nothing
REWARD = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"


def build(out: Path, *, double: int, single: int, seed: int = 0) -> None:
    """A checkpoint of random weights in float16; the words are those of the embedded model's tokenizer."""
    import_torchvision()
    from diffusers import VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    transformer = MeissonicTransformer(num_layers=double, num_single_layers=single)
    config = {"_class_name": "Transformer2DModel", "num_layers": double, "num_single_layers": single,
              "downsample": True, "upsample": True}
    words = CLIPTokenizer.from_pretrained(find("embedded") / "tokenizer", model_max_length=77)
    generator = Generator(
        transformer, VQModel(**VQ), CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), words, config,
        {"_class_name": "Scheduler", "mask_token_id": 8255}, (64, 64), (1024, 1024), 8255, 8192, 64,
        Sampler(guidance=9.0), "", (1024.0, 1024.0, 0.0, 0.0, 6.0),
    )
    save_generator(generator, out, dtype=torch.float16)


def measured(command: list[str], *, cwd: Path) -> dict[str, float]:
    """Runs a command of speedrl; seconds and the most memory, GB, of the largest process yet started."""
    began = time.perf_counter()
    paths = os.pathsep.join((str(Path(__file__).parents[1].resolve()), str(cwd.resolve())))
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, "-m", "speedrl", *command], check=True, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(time.perf_counter() - began, 1), "peak_gb": round(peak * 1024 / 1e9, 2)}


def main(
    *,
    out: Annotated[Path, Option(help="Where the checkpoint and the image go.")] = Path("runs/released"),
    size: Annotated[str, Option(help="Height and width in pixels.")] = "1024x1024",
    steps: Annotated[int, Option(help="Sampling steps.")] = 1,
    blocks: Annotated[int | None, Option(help="Double and single blocks each. [default: 14 and 28]")] = None,
    precision: Annotated[str, Option(help="fp32, bf16 or fp16.")] = "fp32",
    train: Annotated[bool, Option(help="Also train for one iteration of two images.")] = False,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Draw, and train, at the released size with random weights."""
    model = out / f"model{blocks or ''}"
    if not (model / "transformer").exists():
        with Console().status("random weights"):
            build(model, double=blocks or 14, single=blocks or 28)
    shared = ["--model", str(model), "--steps", str(steps), "--size", size, "--device", device]
    image = str(out / "image.png")
    found = {"sample": measured(["sample", "an owl", *shared, "--precision", precision, "--out", image], cwd=out)}
    if train:
        (out / "brightness.py").write_text(REWARD, encoding="utf-8")
        (out / "prompts.txt").write_text("an owl\n", encoding="utf-8")
        run = out / f"train-{int(time.time())}"
        small = "--iterations 1 --groups 1 --group-size 2 --micro-batch 1 --search 0 --no-compare"
        own = ["--quality", "brightness:score", "--prompts", str(out / "prompts.txt"), "--out", str(run)]
        command = ["train", *shared, *small.split(), *own]
        found["train"] = measured(command, cwd=out)
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(in_one_line(main))
