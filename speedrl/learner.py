"""What learns: the policy's networks, the step policy, their optimizer and the moving average of their weights."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speedrl.method.advantages import group_advantages
from speedrl.method.losses import reward_slopes
from speedrl.method.sampling import Trajectory
from speedrl.method.steps import StepPolicy
from speedrl.models.generator import Generator, codebook, cut_prompts, decode_embeddings, fitting_batch
from speedrl.models.loading import load_generator
from speedrl.models.lora import WithoutLora, add_lora
from speedrl.models.sources import find
from speedrl.policies import Policy
from speedrl.rewards.mixing import Reward
from speedrl.run import distributed
from speedrl.run.prompts import open_prompts
from speedrl.updates import with_oom_backoff

WEAK_GUIDANCE = 2.0  # below it a model is trained without guidance, one network evaluation a step in place of two


class SamplerSettings(NamedTuple):
    """How rollouts are sampled and scored, with the model's own in place of None."""

    guidance: float
    reference_guidance: float
    temperature: float
    schedule: str
    order: str
    remask: float


def sampler_of(generator: Generator, settings: Mapping[str, Any], *, most: int) -> SamplerSettings:
    """The settings of the sampler; `most` is the largest number of steps.

    guidance None is 1 where the model's own is weak, else its own: a model whose guidance is strong starts from poor
    images without it. remask None is 0.5 where remasking steps exist, from 6 steps on.
    """
    own: dict[str, Any] = {
        "guidance": 1.0 if generator.guidance < WEAK_GUIDANCE else generator.guidance,
        "reference_guidance": generator.guidance, "temperature": generator.temperature,
        "schedule": generator.schedule, "order": generator.order, "remask": 0.5 if most >= 6 else 0.0,
    }
    return SamplerSettings(**{name: value if settings[name] is None else settings[name] for name, value in own.items()})


def training_prompts(model: str, prompts: str | Path | Sequence[str] | None = None) -> Sequence[str]:
    """The prompts to train on: those of `open_prompts`, or without any given those that come with the embedded model.
    ValueError for another model, which has none."""
    if prompts is not None:
        return open_prompts(prompts)
    if model != "embedded":
        raise ValueError("--prompts is missing, and only the embedded model has its own: give a file, a prompt a line")
    return open_prompts(find(model) / "prompts/train.txt")


def warn_of_prompts(
    warn: Callable[[str], None], generator: Generator, prompts: Sequence[str], how: SamplerSettings, *, first: int = 999
) -> None:
    """Warns of prompts that the text encoder cuts, among the `first`, and of a negative prompt without effect."""
    looked = list(prompts[:first])
    if cut := cut_prompts(generator, looked):
        warn(f"{cut} of the {'first ' * (len(prompts) > first)}{len(looked)} prompts are longer than the text encoder "
             "reads, and are cut")
    if generator.negative and how.guidance == how.reference_guidance == 1:
        warn("the negative prompt has no effect at guidance 1: give --guidance or --reference-guidance above 1")


def draw_prompts(count: int, groups: int, random: torch.Generator) -> list[int]:
    """Which of `count` prompts the groups of an iteration have: each once before any twice."""
    rounds = [torch.randperm(count, generator=random) for _ in range(-(-groups // count))]
    return torch.cat(rounds)[:groups].tolist()


@dataclasses.dataclass
class Learner:
    """The networks and the optimizer of a training."""

    transformer: nn.Module
    reference: Any  # a frozen copy of the transformer, the transformer without its adapter, or None
    step_policy: StepPolicy | None  # None where the step count is fixed
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


def new_learner(
    generator: Generator, settings: Mapping[str, Any], choices: Tensor, width: int, *, device: str
) -> Learner:
    """What trains a generator by these settings: adds the adapter, copies the reference, compiles and shards.

    `choices` are the step counts, int64 [K]; `width` that of the pooled text embedding.
    """
    transformer, lora, sharded = generator.transformer, settings["lora"], settings["parallel"] == "fsdp"
    add_adapter(transformer, settings)
    reference = None
    if settings["kl_weight"] and settings["kl"] != "none":
        reference = copy.deepcopy(transformer).requires_grad_(False) if lora is None else WithoutLora(transformer)
    transformer.gradient_checkpointing = settings["checkpointing"]
    networks: list[Any] = [transformer] if reference is None else [transformer, reference]
    for network in networks:
        if settings["compile"] and not sharded:  # compiled blocks that gather their weights are not verified yet
            network.compile_blocks()
        if sharded and isinstance(network, nn.Module):
            distributed.shard(network, device=device, offload=settings["offload"], bf16=settings["bf16"])
    learned = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    rates: list[dict[str, Any]] = [{"params": list(learned.values())}]
    step_policy = StepPolicy(choices, width).to(device) if len(choices) > 1 else None
    if step_policy is not None:
        rates += step_policy.parameter_groups(settings["steps_lr"])
        learned |= {f"steps.{name}": p for name, p in step_policy.named_parameters()}
    optimizer = torch.optim.AdamW(rates, lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = {name: p.detach().clone() for name, p in learned.items()} if settings["ema"] else {}
    return Learner(transformer, reference, step_policy, learned, optimizer, average)


def add_adapter(transformer: nn.Module, settings: Mapping[str, Any]) -> None:
    """Adds the adapter that the settings ask for, in place; nothing without one."""
    if settings["lora"] is not None:
        add_lora(transformer, rank=settings["lora"], alpha=settings["lora_alpha"], targets=settings["lora_targets"],
                 seed=settings["seed"])


def whole_generator(generator: Generator, settings: Mapping[str, Any]) -> Generator:
    """The generator to save trained weights in: loaded anew, with its adapter, where this one's weights are sharded."""
    if settings["parallel"] != "fsdp":
        return generator
    fresh = load_generator(settings["model"], **(settings["loading"] or {}))
    add_adapter(fresh.transformer, settings)
    return fresh


def slopes_of(
    generator: Generator,
    reward: Reward,
    trajectory: Trajectory,
    prompts: list[str],
    residuals: Tensor,
    *,
    weight: float,
    bf16: bool,
) -> Tensor:
    """The reward's gradient at the embeddings of the finished tokens, times `weight`: float32 [B, L, C].

    In units of the standard deviation within groups of the residuals [G, n], as the advantages are.
    """

    def quality(embeddings: Tensor, texts: list[str]) -> Tensor:
        return reward(decode_embeddings(generator, embeddings, bf16=bf16), texts)

    def slopes(size: int) -> Tensor:
        return reward_slopes(trajectory.tokens, codebook(generator), quality, prompts, batch=size)

    found, _ = distributed.on_all_ranks(partial(with_oom_backoff, slopes, fitting_batch(generator)))
    return weight / (group_advantages(residuals, std="none").square().mean().sqrt() + 1e-4) * found
