"""Against diffusers' AmusedPipeline: the same weights, steps, guidance and precision on a small model of its shape."""

import json
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from experiments.bench.measure import synchronise
from speedrl.generation import sample
from speedrl.models.loading import load_generator
from speedrl.models.sources import find
from speedrl.system.platform import bf16_is_fast, import_torchvision


def write_model(folder: Path, *, hidden: int, layers: int, codes: int, tokens: int) -> None:
    """An AmusedPipeline of random weights: `tokens` a side, 8 pixels a token, the embedded model's tokenizer."""
    import_torchvision()
    from diffusers import AmusedScheduler, UVit2DModel, VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    UVit2DModel(
        hidden_size=hidden, cond_embed_dim=hidden, micro_cond_encode_dim=64, micro_cond_embed_dim=5 * 64,
        encoder_hidden_size=hidden, vocab_size=codes + 1, codebook_size=codes, in_channels=hidden,
        block_out_channels=hidden, num_res_blocks=3, block_num_heads=hidden // 64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, intermediate_size=4 * hidden, sample_size=tokens,
    ).save_pretrained(folder / "transformer")
    VQModel(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
        block_out_channels=(32, 32, 64, 64), latent_channels=64, sample_size=32, num_vq_embeddings=codes,
        vq_embed_dim=64, norm_num_groups=32, mid_block_add_attention=False, lookup_from_codebook=True,
    ).save_pretrained(folder / "vqvae")
    text = CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, projection_dim=hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 64, max_position_embeddings=77,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder")
    AmusedScheduler(codes).save_pretrained(folder / "scheduler")
    shutil.copytree(find("embedded") / "tokenizer", folder / "tokenizer")
    config = folder / "tokenizer/tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"model_max_length": 77}
    config.write_text(json.dumps(settings), encoding="utf-8")
    index = {name: list(pair) for name, pair in {
        "transformer": ("diffusers", "UVit2DModel"), "vqvae": ("diffusers", "VQModel"),
        "scheduler": ("diffusers", "AmusedScheduler"), "tokenizer": ("transformers", "CLIPTokenizer"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    }.items()}
    text = json.dumps({"_class_name": "AmusedPipeline"} | index)
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def against_pipeline(ceilings: dict[str, float], *, device: str, small: bool, out: Path) -> list[dict]:
    """Images a second, from prompt to pixels, of diffusers' `AmusedPipeline` and of ours. Both have the same random
    weights in aMUSEd's shape (width 512, 8 layers, 16x16 tokens, 8192 codes), 12 steps and guidance 10. They take
    turns; medians of 5. The last two columns are ours, compiled, over theirs."""
    import_torchvision()
    from diffusers import AmusedPipeline

    sizes = {"hidden": 64, "layers": 2, "codes": 64, "tokens": 8} if small else {"hidden": 512, "layers": 8,
             "codes": 8192, "tokens": 16}
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    steps, repeats, side = (2, 1, sizes["tokens"] * 8) if small else (12, 5, sizes["tokens"] * 8)
    ways = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), **sizes)
        for how in ("", " compiled"):
            pipeline = AmusedPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
            pipeline.set_progress_bar_config(disable=True)
            generator = load_generator(folder, device=device, dtype=dtype)
            if how:
                pipeline.transformer.compile()
                generator.transformer.compile_blocks()
            ways[f"theirs{how}"] = partial(
                pipeline, num_inference_steps=steps, guidance_scale=10.0, output_type="pt", height=side, width=side
            )
            ways[f"ours{how}"] = partial(sample, generator, steps=steps,
                                         sampler=generator.sampler.replace(guidance=10.0))
    rows = []
    for batch in (2, 1) if small else (8, 1):
        prompts = [f"an owl, number {i}" for i in range(batch)]
        times = {name: [] for name in ways}
        for turn in range(repeats + 2):
            for name, way in ways.items():
                synchronise(device)
                began = time.perf_counter()
                way(prompts)
                synchronise(device)
                if turn > 1:  # the first two compile
                    times[name].append(time.perf_counter() - began)
        speed = {name: batch / statistics.median(seconds) for name, seconds in times.items()}
        rows.append({"batch": batch, "precision": "bf16" if dtype is torch.bfloat16 else "fp32"} | speed | {
                     "over theirs": speed["ours compiled"] / speed["theirs"],
                     "over theirs compiled": speed["ours compiled"] / speed["theirs compiled"]})
    return rows
