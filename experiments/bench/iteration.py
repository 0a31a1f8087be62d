"""One iteration of training, ours or the plain one, in a process of its own: its seconds, operations and peak memory.

`python -m experiments.bench.iteration ours --grid 64 --codes 8192` prints them as JSON. What both share, the decoder
and the reward, is left out.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor, nn
from typer import Option

from experiments.bench.measure import peak_gb, seconds_of
from experiments.bench.plain import plain_rollout, plain_update
from experiments.bench.scaling import picture_flops
from speedrl.cli import in_one_line
from speedrl.generation import Policy
from speedrl.method.divergences import DIVERGENCES
from speedrl.method.ratios import LIKELIHOODS
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import Step, Trajectory, compiled_step, draw_noise, rollout, step
from speedrl.method.scoring import Scores, compiled_score, score_logits, trained_steps
from speedrl.models.generator import Prompts, index_prompts, repeat_prompts
from speedrl.models.loading import load_generator
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.system.platform import bf16_autocast, bf16_is_fast, quiet_allocator
from speedrl.training import grpo_loss

KINDS = ("ours", "plain", "plain-each-step")


class Sizes(NamedTuple):
    """What an iteration is of."""

    batch: int
    steps: int
    grid: tuple[int, int]
    text: int
    guidance: float
    micro_batch: int
    train_steps: int | None
    likelihood: str
    kl_weight: float
    step: Callable[..., Step]
    score: Callable[..., Scores]


def build(*, width: int, head: int, double: int, single: int, codes: int, device: str) -> MeissonicTransformer:
    """A transformer of random weights in Meissonic's shape."""
    torch.manual_seed(0)
    model = MeissonicTransformer(
        num_layers=double, num_single_layers=single, attention_head_dim=head, num_attention_heads=width // head,
        joint_attention_dim=width, pooled_projection_dim=width, axes_dims_rope=(head // 8, *[head * 7 // 16] * 2),
        vocab_size=codes + 64, codebook_size=codes,
    )
    return model.to(device)


def random_prompts(count: int, model: MeissonicTransformer, *, text: int, device: str) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    joint, pooled = model.context_embedder.in_features, model.time_text_embed.text_embedder.linear_1.in_features
    words, whole = torch.randn(count, text, joint, generator=generator), torch.randn(count, pooled, generator=generator)
    return Prompts(words.to(device), whole.to(device), torch.ones(count, 5, device=device))


def sample(policy: Policy, sizes: Sizes) -> Trajectory:
    device, length = policy.empty.text.device, sizes.grid[0] * sizes.grid[1]
    counts = torch.full((sizes.batch,), sizes.steps, device=device)
    noise = draw_noise(sizes.batch, sizes.steps, length, seed=0, device=device)
    return rollout(policy, counts, noise, Sampler(guidance=sizes.guidance), step=sizes.step)


def update(
    policy: Policy, reference: nn.Module | None, optimizer: torch.optim.Optimizer, batch: Trajectory,
    advantages: Tensor, autocast: torch.autocast, sizes: Sizes,
) -> None:
    """As the training loop does it."""
    trained = trained_steps(batch.steps, sizes.train_steps, torch.Generator().manual_seed(0))
    keep = torch.ones_like(advantages)
    before = None if reference is None else dataclasses.replace(policy, transformer=reference)
    for index in torch.arange(len(batch), device=advantages.device).split(sizes.micro_batch):
        with autocast:
            loss, _ = grpo_loss(
                policy[index], None if before is None else before[index], batch[index], advantages[index], keep[index],
                trained[index], likelihood=LIKELIHOODS[sizes.likelihood], kl=DIVERGENCES["ce"],
                kl_weight=sizes.kl_weight, score_logits=sizes.score,
            )
        (loss / batch.tokens.numel()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def operations(model: MeissonicTransformer, sizes: Sizes) -> tuple[float, float]:
    """FLOPs of our rollout and of our update."""
    each = picture_flops(
        model, grid=sizes.grid, text=sizes.text, steps=sizes.steps, trained=sizes.train_steps, guidance=sizes.guidance,
        reference=bool(sizes.kl_weight),
    )
    return sizes.batch * each[0], sizes.batch * each[1]


def main(
    kind: Annotated[str, typer.Argument(help="ours, plain or plain-each-step.")],
    *,
    model: Annotated[str, Option(help="random, or a model that `speedrl` loads.")] = "random",
    width: Annotated[int, Option(help="Width of a random model.")] = 1024,
    head: Annotated[int, Option(help="Width of an attention head.")] = 128,
    double: Annotated[int, Option(help="Double-stream blocks.")] = 1,
    single: Annotated[int, Option(help="Single-stream blocks.")] = 2,
    codes: Annotated[int, Option(help="Codes of the codebook.")] = 8192,
    grid: Annotated[int, Option(help="Tokens of a side.")] = 64,
    text: Annotated[int, Option(help="Words of a prompt.")] = 77,
    batch: Annotated[int, Option(help="Images of an iteration.")] = 2,
    micro_batch: Annotated[int, Option(help="Images of a backward pass, 0 for all.")] = 0,
    steps: Annotated[int, Option(help="Sampling steps.")] = 4,
    train_steps: Annotated[int, Option(help="Steps that enter the loss, 0 for all.")] = 0,
    likelihood: Annotated[str, Option(help="token, exact or sequence.")] = "token",
    guidance: Annotated[float, Option(help="1 is none.")] = 1.0,
    kl_weight: Annotated[float, Option(help="0 leaves the reference out.")] = 0.02,
    precision: Annotated[str, Option(help="auto, fp32 or bf16.")] = "auto",
    compile: Annotated[bool, Option(help="Compile ours.")] = True,
    quiet: Annotated[bool, Option(help="Give the plain one our setting of the allocator too.")] = False,
    checkpointing: Annotated[bool, Option(help="Compute blocks again in the backward pass.")] = False,
    repeats: Annotated[int, Option(help="Runs; their median counts.")] = 3,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure one iteration."""
    if kind not in KINDS:
        raise typer.BadParameter(f"choose {', '.join(KINDS)}")
    if kind == "ours" or quiet:
        quiet_allocator()
    if model == "random":
        transformer = build(width=width, head=head, double=double, single=single, codes=codes, device=device)
        side, mask_id = (grid, grid), codes + 63
    else:
        generator = load_generator(model, device=device)
        transformer, side, mask_id = generator.transformer, generator.grid, generator.mask_id
        text = generator.tokenizer.model_max_length
    decide, score = step, score_logits
    if compile:
        decide, score = compiled_step(), compiled_score()
    sizes = Sizes(batch, steps, side, text, guidance, micro_batch or batch, train_steps or None, likelihood, kl_weight,
                  decide, score)
    reference = copy.deepcopy(transformer).requires_grad_(False) if kl_weight else None
    transformer.gradient_checkpointing = checkpointing
    prompts = random_prompts(batch, transformer, text=text, device=device)
    empty = index_prompts(prompts, torch.zeros(1, dtype=torch.int64, device=device))
    advantages = torch.randn(batch, generator=torch.Generator().manual_seed(2)).to(device)
    fast = bf16_is_fast(device) if precision == "auto" else precision == "bf16"
    autocast = bf16_autocast(device, enabled=fast)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-6, fused=True if kind == "ours" else None)
    held = []
    if kind == "ours":
        if compile:
            for network in filter(None, (transformer, reference)):
                network.compile_blocks()
        policy = Policy(transformer, prompts, empty, guidance, side, mask_id)

        def sampling() -> None:
            with autocast:
                held[:] = [sample(policy, sizes)]

        def training() -> None:
            update(policy, reference, optimizer, held[0], advantages, autocast, sizes)
    else:
        how = {"steps": steps, "guidance": guidance, "grid": side}
        everyone = repeat_prompts(empty, batch)
        if reference is None:
            raise typer.BadParameter("the plain iteration has a reference: give a --kl-weight")

        def sampling() -> None:
            with autocast:
                held[:] = [plain_rollout(transformer, prompts, everyone, mask_id=mask_id, **how)]

        def training() -> None:
            plain_update(
                transformer, reference, optimizer, held[0], prompts, everyone, advantages, autocast=autocast,
                kl_weight=kl_weight, each_step=kind == "plain-each-step", **how,
            )

    found = {"kind": kind, "precision": "bf16" if fast else "fp32"}
    before = peak_gb(device)
    found["sampling s"] = seconds_of(sampling, device=device, repeats=repeats)
    found["training s"] = seconds_of(training, device=device, repeats=repeats)
    found["peak GB"] = peak_gb(device)
    found["GB above the weights"] = found["peak GB"] - before
    found["sampling FLOP"], found["training FLOP"] = operations(transformer, sizes)
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(in_one_line(main))
