"""What learns: the networks, the step policy, the optimizer, and the moving average of the weights."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedrl.generation import Policy
from speedrl.method.sampler import Sampler
from speedrl.method.steps import StepPolicy
from speedrl.models.generator import Generator, cut_prompts
from speedrl.models.lora import WithoutLora, add_lora
from speedrl.models.sources import find
from speedrl.run import distributed
from speedrl.run.prompts import open_prompts

WEAK_GUIDANCE = 2.0  # below it a model is trained without guidance, one network evaluation a step in place of two


@dataclasses.dataclass
class Learner:
    """The networks and the optimizer of a training."""

    transformer: nn.Module
    reference: Any  # a frozen copy of the transformer, the transformer without its adapter, or None
    step_policy: nn.Module | None  # None where the step count is fixed
    learned: dict[str, nn.Parameter]  # by name; those of the step policy as steps.NAME
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]  # the moving average of `learned`, {} without

    def step_log_probs(self, pooled: Tensor) -> Tensor:
        """Log-probabilities of the step counts for pooled text embeddings [B, D]: [B, K], 0 for a fixed count."""
        return pooled.new_zeros(len(pooled), 1) if self.step_policy is None else self.step_policy(pooled)

    def reference_for(self, policy: Policy, guidance: float) -> Policy | None:
        """The reference policy for the same samples, at its own guidance."""
        if self.reference is None:
            return None
        return dataclasses.replace(policy, transformer=self.reference, guidance=guidance)

    def warm_up(self, lr: float, iteration: int, warmup: int) -> None:
        """Sets the policy's learning rate, which rises linearly over `warmup` iterations: Adam's first updates are as
        large as any, and follow the noise of one rollout. The step policy's stays."""
        self.optimizer.param_groups[0]["lr"] = lr * min(1, (iteration + 1) / (warmup + 1))

    def step(self, *, clip_grad: float) -> Tensor:
        """Sums the gradients of all ranks, clips those of each group of parameters, takes a step if they are finite.

        Returns the first group's norm before clipping, a scalar, or NaN where another's is not finite.
        """
        groups = [group["params"] for group in self.optimizer.param_groups]
        distributed.sum_gradients([p for group in groups for p in group])
        norms = [nn.utils.clip_grad_norm_(group, clip_grad) for group in groups]
        norm, *others = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms)
        norm = norm + 0 * sum(others)
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def update_average(self, *, decay: float, updates: int) -> None:
        """Moves the exponential moving average of the weights towards them; faster over the first updates, so that
        where it started does not count for long."""
        decay = min(decay, (1 + updates) / (10 + updates))
        for name, value in self.average.items():
            value.lerp_(self.learned[name].detach(), 1 - decay)


def training_sampler(sampler: Sampler, *, most: int, **given: Any) -> Sampler:
    """How rollouts of at most `most` steps are sampled: as given, with the model's own in place of None.

    guidance None is 1 where the model's own is weak, else its own: a model whose guidance is strong starts from poor
    images without it. remask None is 0.5 where remasking steps exist, from 6 steps on.
    """
    own = sampler.replace(guidance=1.0 if sampler.guidance < WEAK_GUIDANCE else None, remask=0.5 if most >= 6 else 0.0)
    return own.replace(**given)


def training_prompts(model: Any, prompts: str | Path | Iterable[str] | None = None) -> Sequence[str]:
    """The prompts to train on: those of `open_prompts`, or without any given those that come with the embedded model.
    ValueError for another model, which has none."""
    if prompts is not None:
        return open_prompts(prompts)
    if model != "embedded":
        raise ValueError("`prompts` is missing, and only the embedded model has its own: give a file, a prompt a line")
    return open_prompts(find(model) / "prompts/train.txt")


def warn_of_prompts(
    warn: Callable[[str], None], generator: Generator, prompts: Sequence[str], guidances: Sequence[float],
    *, first: int = 999,
) -> None:
    """Warns of prompts that the text encoder cuts, among the `first`, and of a negative prompt without effect."""
    looked = list(prompts[:first])
    if cut := cut_prompts(generator, looked):
        warn(f"{cut} of the {'first ' * (len(prompts) > first)}{len(looked)} prompts are longer than the text encoder "
             "reads, and are cut")
    if generator.negative and all(guidance == 1 for guidance in guidances):
        warn("the negative prompt has no effect at guidance 1: give --guidance or --reference-guidance above 1")


def draw_prompts(count: int, groups: int, random: torch.Generator) -> list[int]:
    """Which of `count` prompts the groups of an iteration have: each once before any twice."""
    rounds = [torch.randperm(count, generator=random) for _ in range(-(-groups // count))]
    return torch.cat(rounds)[:groups].tolist()


def new_learner(
    generator: Generator,
    choices: Tensor,
    *,
    reference: bool,
    lr: float,
    steps_lr: float,
    ema: float,
    step_policy: Callable[[Tensor, int], nn.Module] = StepPolicy,
    lora: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
    seed: int = 0,
    checkpointing: bool = False,
    compile: bool = False,
    parallel: str = "ddp",
    offload: bool = False,
    bf16: bool = False,
    device: str = "cpu",
) -> Learner:
    """What trains a generator: adds the adapter, copies the `reference` if one is wanted, compiles and shards.

    `choices` are the step counts, int64 [K].
    """
    transformer, sharded = generator.transformer, parallel == "fsdp"
    if lora is not None:
        add_lora(transformer, rank=lora, alpha=lora_alpha, targets=lora_targets, seed=seed)
    frozen: Any = None
    if reference:
        frozen = copy.deepcopy(transformer).requires_grad_(False) if lora is None else WithoutLora(transformer)
    transformer.gradient_checkpointing = checkpointing
    networks: list[Any] = [transformer, frozen] if reference else [transformer]
    for network in networks:
        if compile and not sharded:  # compiled blocks that gather their weights are not verified yet
            network.compile_blocks()
        if sharded and isinstance(network, nn.Module):
            distributed.shard(network, device=device, offload=offload, bf16=bf16)
    learned = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    rates: list[dict[str, Any]] = [{"params": list(learned.values())}]
    steps = None
    if len(choices) > 1:
        steps = step_policy(choices, int(generator.text_encoder.config.projection_dim or 0)).to(device)
        plain = [{"params": list(steps.parameters()), "lr": steps_lr}]
        rates += steps.parameter_groups(steps_lr) if isinstance(steps, StepPolicy) else plain
        learned |= {f"steps.{name}": p for name, p in steps.named_parameters()}
    optimizer = torch.optim.AdamW(rates, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = {name: p.detach().clone() for name, p in learned.items()} if ema else {}
    return Learner(transformer, frozen, steps, learned, optimizer, average)
