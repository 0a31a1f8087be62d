"""The training loop: GRPO on the rollouts of a masked image generator, for quality in few steps."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from speedrl.learner import (
    draw_prompts,
    new_learner,
    sampler_of,
    slopes_of,
    training_prompts,
    warn_of_prompts,
    whole_generator,
)
from speedrl.method.advantages import count_residuals, group_advantages, leave_one_out
from speedrl.method.filters import low_quality, std_percentile
from speedrl.method.rewards import combine, speed_reward
from speedrl.method.sampling import compiled_step, draw_noise, rollout, step
from speedrl.method.schedules import parse_steps
from speedrl.method.search import scalars_at
from speedrl.method.steps import draw_steps, step_choices, step_loss
from speedrl.models.generator import codebook, decode, encode_prompts, index_prompts
from speedrl.models.loading import load_generator
from speedrl.policies import Policy, score_logits
from speedrl.rewards.mixing import check_gradient, open_reward
from speedrl.run import distributed
from speedrl.run.checkpoints import to_jsonable
from speedrl.run.exporting import lasting_sources, save_trained
from speedrl.run.prompts import as_list
from speedrl.run.session import open_run
from speedrl.run.settings import check, check_sampler
from speedrl.stages import prepare_sampler
from speedrl.system.errors import unsaved
from speedrl.system.platform import bf16_autocast, bf16_is_fast, can_compile, pick_device
from speedrl.updates import (
    ema_update,
    gradients,
    iteration_metrics,
    optimizer_step,
    part_means,
    trained_steps,
    with_oom_backoff,
)


def train(
    *,
    # basic
    out: str | Path = "runs/train", model: str = "embedded", prompts: str | Path | Sequence[str] | None = None,
    quality: Any = "embedded", steps: str | int = "1-16", steps_reward: float | None = None, iterations: int = 60,
    groups: int = 8, group_size: int = 16, lr: float = 1e-4, kl_weight: float = 0.2, lora: int | None = None,
    device: str = "auto", seed: int = 0, resume: bool = False,
    # reinforcement learning
    likelihood: str = "token", kl: str = "ce", clip_range: float = 0.2, updates: int = 1, percentile: float = 10.0,
    min_quality: float = -2.0, advantage_std: str = "group", reward_gradient: float = 0.0,
    train_steps: int | None = None,
    # sampler
    guidance: float | None = None, reference_guidance: float | None = None, order: str | None = None,
    schedule: str | None = None, temperature: float | None = None, remask: float | None = None, search: int = 64,
    # reward
    quality_gate: float | None = None, quality_clip: float | None = None, reward_weights: Sequence[str] = (),
    # memory, speed, ranks and output
    micro_batch: int = 16, checkpointing: bool = False, bf16: bool | None = None, compile: bool = True,
    parallel: str = "ddp", offload: bool = False, trackers: Sequence[str] = (), ema: float = 0.9, save_every: int = 10,
    # what nobody turns
    steps_lr: float = 0.1, warmup: int = 5, clip_grad: float = 1.0, max_skipped: int = 10, keep_checkpoints: int = 3,
    lora_alpha: float | None = None, lora_targets: str | None = None, loading: Mapping[str, Any] | None = None,
) -> Path:
    """Trains `model` to need fewer steps and saves it: to OUT/model, or with `lora`, a rank, to OUT/adapter.

    The method (Speed-RL, arXiv 2512.01094): each iteration draws `group_size` images of `groups` prompts. The reward of
    an image is its quality plus `steps_reward` times the share of the steps that it saved, in units of the base's own
    quality gap between its most steps and one (`quality_gap`). None is 0.5, or 0 where `steps` is one number or
    `quality` "none". Advantages within the groups train the policy by `updates` updates on the clipped loss, plus
    `kl_weight` times the divergence from the reference policy, which is the model before training. Where `steps` is a
    range like "1-16", a step policy learns how many steps each prompt takes (`method.steps`), and tokens are compared
    with tokens of equal step count (`count_residuals`); with one number every image takes that many.

    `prompts` is a file, a list, or None for those of the embedded model. `quality` is what `load_qualities` takes, a
    function of images and prompts included; "none" trains by the divergence alone. `guidance` None is 1 for a model
    whose own guidance is below 2, else the model's; the reference is guided as the model is by itself
    (`reference_guidance`). `order`, `schedule` and `temperature` None are the model's own. `remask` is the share of the
    tokens that the last quarter of 6 steps or more draws again; None is 0.5 where there are so many steps. `search`
    rounds find the sampler's scalars before training (`search_sampler`), and the saved model keeps them; with 0
    `iterations` that is all.

    `likelihood` "token" is the paper's surrogate, "sequence" its alternative; "exact" scores the choice of positions
    too. `train_steps` of each rollout enter the loss, all by default. `percentile` and `min_quality` filter groups and
    samples. `advantage_std` divides advantages by the deviation of the group, the batch, or nothing. `reward_gradient`
    adds the reward's own gradient through the decoder, another, white-box method.

    The weights saved are their moving average of decay `ema`, or at 0 the weights. The learning rate rises over the
    first `warmup` iterations. `micro_batch` is halved where memory runs out. An update whose gradient is not finite is
    skipped; `max_skipped` in a row end the training. Under torchrun, ranks share the groups; noise and prompts do not
    depend on their number. `loading` holds further options of `load_generator`, which the saved model keeps.

    OUT/metrics.jsonl gets a line an iteration; OUT/checkpoints holds the newest `keep_checkpoints`, from which `resume`
    goes on exactly. Returns the folder of the model or adapter. ValueError and FileNotFoundError for what cannot be
    used, before anything is written; `Stopped` after SIGINT, SIGTERM or SIGHUP.
    """
    prompts = as_list(prompts)
    settings, (least, most) = to_jsonable(locals()), parse_steps(steps)
    if steps_reward is None:
        steps_reward = settings["steps_reward"] = 0.0 if least == most or quality == "none" else 0.5
    check(settings, least, most)
    device = distributed.join(pick_device(device), parallel=parallel)
    bf16 = settings["bf16"] = bf16_is_fast(device) if bf16 is None else bf16
    texts, generator = training_prompts(model, prompts), load_generator(model, device=device, **(loading or {}))
    how = sampler_of(generator, settings, most=most)
    check_sampler(settings | how._asdict(), most=most, length=generator.grid[0] * generator.grid[1])
    settings |= how._asdict() | to_jsonable(lasting_sources(model, loading))
    reward = open_reward(quality, generator, reward_weights, clip=quality_clip, bf16=bf16, device=device, prompts=texts)
    if reward_gradient:
        check_gradient(reward, generator, texts)
    empty, choices = encode_prompts(generator, [generator.negative]), step_choices(least, most).to(device)
    learner = new_learner(generator, settings, choices, empty.pooled.shape[-1], device=device)
    random, autocast = torch.Generator().manual_seed(seed), bf16_autocast(device, enabled=bf16)
    compiles, sharded, (rows, columns) = compile and can_compile(device), parallel == "fsdp", generator.grid
    sample = partial(
        rollout, grid=generator.grid, mask_id=generator.mask_id, temperature=how.temperature, schedule=how.schedule,
        order=how.order, remask=how.remask, step=compiled_step() if compiles else step,
    )
    backward = partial(
        gradients, autocast=autocast, mask_id=generator.mask_id, order=how.order, likelihood=likelihood,
        clip_range=clip_range, kl=kl, kl_weight=kl_weight, codes=codebook(generator) if reward_gradient else None,
        score=torch.compile(score_logits, dynamic=True) if compiles else score_logits,
    )
    size, local = groups * group_size, distributed.local_slice(groups, times=group_size)  # samples, this rank's
    of_group = torch.arange(groups, device=device).repeat_interleave(group_size)

    with open_run(Path(out), settings, trackers=trackers) as run:
        record = run.restore(learner.learned, learner.optimizer, learner.average, random, device)
        reward.restore(record)
        warn_of_prompts(run.warn, generator, texts, how)
        if "gap" not in record:
            run.stage(f"searching the sampler, {search} rounds" if search else "measuring the base", total=search + 2)
        with autocast, distributed.gathered_weights(learner.transformer, sharded=sharded):
            stages = partial(prepare_sampler, record, generator, texts, reward, how, choices, rounds=search, seed=seed,
                             between=run.advance)
            table, gap = distributed.on_all_ranks(stages)
        run.stage("compiling: the first iteration takes a minute or two" if compiles else "the first iteration")
        for iteration in run.iterations():
            # ROLLOUT of this rank's samples; prompts, counts and noise do not depend on the number of ranks
            began, chosen = time.time(), [texts[i] for i in draw_prompts(len(texts), groups, random)]
            asked = [text for text in chosen for _ in range(group_size)][local]
            prompt = index_prompts(encode_prompts(generator, chosen), of_group)
            drawn = draw_steps(learner.step_log_probs(prompt.pooled), torch.rand(size, generator=random).to(device))
            counts = choices[drawn]
            policy = Policy(learner.transformer, prompt, empty, how.guidance, generator.grid)[local]
            noise = draw_noise(len(asked), most, rows * columns, seed=seed, first=iteration * size + local.start,
                               device=device)
            with autocast, distributed.gathered_weights(learner.transformer, sharded=sharded):
                trajectory = sample(policy, counts[local], noise, scalars=scalars_at(table, counts[local]))
            # REWARD of all ranks' samples: quality, and speed in units of the base's quality gap
            images = decode(generator, trajectory.tokens, bf16=bf16)
            parts = distributed.gathered_parts(distributed.on_all_ranks(partial(reward.parts, images, asked)))
            qualities = reward.observe(parts, size)
            rewards = combine(qualities, speed_reward(counts, max_steps=most), steps_reward=steps_reward * gap,
                              gate=quality_gate)
            # ADVANTAGE within the group of a prompt; tokens are compared at equal step count
            by_group, counts_by_group = (rearrange(x, "(g n) -> g n", n=group_size) for x in (qualities, counts))
            residuals, known = count_residuals(by_group, counts_by_group)
            advantages = rearrange(group_advantages(residuals, std=advantage_std, keep=known), "g n -> (g n)")
            keep = known * std_percentile(residuals, percentile=percentile, keep=known)
            keep = rearrange(keep * low_quality(residuals, threshold=min_quality), "g n -> (g n)")
            of_steps = rearrange(leave_one_out(rearrange(rewards, "(g n) -> g n", n=group_size)), "g n -> (g n)") / gap
            slopes = None
            if reward_gradient:
                slopes = slopes_of(generator, reward, trajectory, asked, residuals, weight=reward_gradient, bf16=bf16)
            # UPDATE on the clipped loss and the divergence; the step policy takes one step for each rollout
            learner.warm_up(lr, iteration, warmup)
            for update in range(updates):
                trained = trained_steps(counts, train_steps, random)[local]
                accumulate = partial(backward, policy, learner.reference_for(policy, how.reference_guidance),
                                     trajectory, trained, advantages[local], keep[local],
                                     keep.sum() * rows * columns, slopes=slopes)
                totals, micro_batch = with_oom_backoff(accumulate, micro_batch, undo=learner.optimizer.zero_grad,
                                                       halve=not sharded)
                if update == 0 and learner.step_policy is not None:
                    log_p = learner.step_log_probs(prompt.pooled)
                    (step_loss(log_p[local], drawn[local], of_steps[local]) / size).backward()
                norm = optimizer_step(learner.optimizer, clip_grad=clip_grad)
                if run.update_was_finite(bool(norm.isfinite()), iteration=iteration):
                    ema_update(learner.average, learner.learned, decay=ema, updates=iteration)
            # METRICS and checkpoints
            totals = distributed.total_stats(totals)
            row = iteration_metrics(iteration + 1, rewards, by_group, counts, keep, norm, totals)
            run.log(row | part_means(parts) | {"images_per_second": size / (time.time() - began)})
            run.check(spread=row["group_std"] > 0 or not reward.scores, falling=reward.falling())
            run.save(iteration + 1, reward.record() | {"search": None if table is None else table.tolist(), "gap": gap})

        weights = distributed.whole(learner.average or learner.learned)
        saved_to = Path(out)
        with unsaved(run.saved):
            if distributed.is_main():
                saved_to = save_trained(saved_to, whole_generator(generator, settings), weights, table, settings)
    distributed.leave()
    return saved_to
