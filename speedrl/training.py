"""The training loop: GRPO on the rollouts of a masked image generator, for quality in few steps."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor

from speedrl.generation import Policy, quality_gap, search_sampler
from speedrl.learner import draw_prompts, new_learner, training_prompts, training_sampler, warn_of_prompts
from speedrl.method.advantages import SCALES, count_residuals, group_advantages, leave_one_out
from speedrl.method.divergences import DIVERGENCES, SAMPLED, Divergence, count_weights
from speedrl.method.filters import low_quality, std_percentile
from speedrl.method.hindsight import hide, hindsight_weights, teacher_features
from speedrl.method.losses import policy_loss
from speedrl.method.ratios import LIKELIHOODS, Likelihood, needs_all_drawn
from speedrl.method.rewards import combine, speed_reward
from speedrl.method.sampler import ORDERS, Sampler
from speedrl.method.sampling import Trajectory, compiled_step, draw_noise, rollout, step
from speedrl.method.scoring import compiled_score, position_weights, positions_of, score, score_logits, trained_steps
from speedrl.method.steps import StepPolicy, draw_steps, step_choices, step_loss
from speedrl.models.generator import Generator, decode, encode_prompts, index_prompts
from speedrl.models.loading import load_generator
from speedrl.rewards.mixing import Reward, open_reward
from speedrl.run import distributed
from speedrl.run.exporting import save_trained, whole_generator
from speedrl.run.metrics import iteration_metrics, part_means
from speedrl.run.prompts import as_list
from speedrl.run.session import open_run
from speedrl.run.settings import check_sampler, check_settings
from speedrl.run.shared_options import (
    PROMPTS,
    QUALITY,
    REWARD_WEIGHTS,
    Device,
    MicroConds,
    Model,
    NegativePrompt,
    Size,
    TextEncoder,
)
from speedrl.run.trackers import TRACKERS
from speedrl.system.errors import unsaved
from speedrl.system.memory import MicroBatches
from speedrl.system.options import MEMORY, OUTPUT, RANKS, REWARD, RL, SAMPLER, Opt
from speedrl.system.platform import bf16_autocast, bf16_is_fast, can_compile, compile_seconds, pick_device


def grpo_loss(
    policy: Policy,
    reference: Policy | None,
    trajectory: Trajectory,
    advantages: Tensor,
    keep: Tensor,
    trained: Tensor,
    *,
    likelihood: Likelihood,
    clip_range: float = 0.2,
    kl: Divergence,
    kl_weight: float = 0.2,
    hindsight: float = 0.0,
    finished: Tensor | None = None,
    on_policy: bool = True,
    score_logits: Callable = score_logits,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of m samples as a sum over tokens: divide it by the samples of all ranks times L.

    advantages float32 [m]; keep float32 [m], the weight of each sample's policy loss, 0 to leave it out; trained bool
    [m, S], the steps that train. `finished` int64 [m, L], with `hindsight`: the samples with some tokens hidden.
    `on_policy` says that the policy's weights are those that drew the trajectory. Statistics are sums, but for _max.

    Deviations from GRPO (arXiv 2402.03300): the divergence is over the whole codebook, of all samples, and weighs less
    in few steps; sums are divided by the tokens of the whole batch, not of each sample; where one update follows a
    rollout the ratio is 1, so that rounding does not clip; `hindsight` adds a dense reward of the reference.
    """
    sampled = kl in SAMPLED
    at = positions_of(trajectory, trained, all_drawn=sampled or needs_all_drawn(likelihood, trajectory.order),
                      all_unknown=finished is not None)
    teacher = None
    if reference is not None and finished is not None:
        teacher = teacher_features(reference, finished, mask_id=trajectory.mask_id)
    scores = score(policy, trajectory, at, reference=reference, kl=kl if kl_weight else None, teacher=teacher,
                   score_logits=score_logits)
    times = trajectory.steps / trained.sum(-1).clamp(min=1)  # where K of a sample's N steps train, each counts N / K
    sample, _, _ = at.place

    # RATIO of new to old probability, of each token, step or sample
    old = scores.log_probs.detach() if on_policy else trajectory.log_probs[at.place]
    events = likelihood(scores.log_probs, old, trajectory, at)
    # CLIPPED LOSS of the kept samples
    weights = events.tokens * (keep * times)[events.sample]
    loss, stats = policy_loss(events.log_ratio, advantages[events.sample], weights, clip_range=clip_range)
    # KL from the reference, of all samples
    weights = position_weights(trajectory, at, sampled=sampled) * times[sample]
    divergence = (scores.kl * weights * count_weights(trajectory.steps)[sample]).sum()
    # HINDSIGHT: how far the policy is from what the reference says with a part of the finished image before it
    missed = torch.zeros(())
    if finished is not None:
        missed = (scores.hindsight * hindsight_weights(trajectory, at, finished) * times[sample]).sum()
        stats["hindsight"] = missed.detach()

    mismatch = (scores.log_probs.detach() - trajectory.log_probs[at.place]).abs()  # rounding, when on policy
    stats |= {"kl": (scores.kl * weights).sum().detach(), "mismatch": (mismatch * weights).sum(),
              "tokens": weights.sum()}
    return loss + kl_weight * divergence + hindsight * missed, stats


def train(
    *,
    model: Model = "embedded",
    prompts: Annotated[str | Path | Iterable[str] | None, Opt(PROMPTS, cli=str | None)] = None,
    quality: Annotated[Any, Opt(f"{QUALITY}, to train without a reward.", cli=str)] = "embedded",
    steps: Annotated[str | int, Opt(
        "Step counts that the policy learns to choose from, like 1-16 or 2,4,8; 8: always 8.", cli=str)] = "1-16",
    steps_reward: Annotated[float | None, Opt(
        "What saving all steps is worth, in units of the base's quality gap between most steps and one; each halving "
        "is worth the same. [default: 0.5; 0 where --steps is one number or --quality is none]", least=0)] = None,
    iterations: Annotated[int, Opt(
        "Rollouts, each followed by its updates; 0 only searches the sampler.", least=0)] = 60,
    groups: Annotated[int, Opt("Prompts of an iteration.", least=1)] = 8,
    group_size: Annotated[int, Opt(
        "Images of each prompt. In a range of steps, the policy loss counts an image only beside another of its prompt "
        "and step count.", flags=("--group-size", "--num-generations"), least=2)] = 16,
    lr: Annotated[float, Opt("Learning rate.", flags=("--lr", "--learning-rate"), above=0)] = 1e-4,
    kl_weight: Annotated[float, Opt(
        "Weight of the divergence from the reference policy, in 16 steps.", flags=("--kl-weight", "--beta"),
        least=0)] = 0.2,
    lora: Annotated[int | None, Opt("Train an adapter of this rank. [default: all weights]", least=1)] = None,
    device: Device = "auto",
    out: Annotated[str | Path, Opt("The run's folder.", cli=Path)] = "runs/train",
    seed: Annotated[int, Opt("The same seed trains the same model.", least=-(2**63), below=2**63)] = 0,
    resume: Annotated[bool, Opt("Go on from the run's newest checkpoint; start if there is none yet.")] = False,
    likelihood: Annotated[str | Likelihood, Opt(
        "token: the paper's surrogate; sequence: the mean over a sample; exact: with the choice of positions.", RL,
        cli=str, choices=LIKELIHOODS)] = "token",
    kl: Annotated[str | Divergence, Opt("Estimator of the divergence; ce is the paper's.", RL, cli=str,
                                        choices=DIVERGENCES)] = "ce",
    clip_range: Annotated[float, Opt("Ratios are clipped to 1 +- this.", RL, above=0)] = 0.2,
    updates: Annotated[int, Opt("Updates on each rollout.", RL, least=1)] = 1,
    percentile: Annotated[float, Opt(
        "This share of the groups, in per cent and rounded to whole groups, does not train: those whose quality varies "
        "least.", RL, least=0, most=100)] = 10.0,
    min_quality: Annotated[float, Opt(
        "Images below the mean of their prompt and step count by more than this many deviations of the batch, like -2, "
        "do not train.", RL, least=-float("inf"))] = -2.0,
    advantage_std: Annotated[str, Opt(
        "What advantages are divided by: the deviation of the group, that of the batch, or nothing.", RL,
        choices=SCALES)] = "group",
    hindsight: Annotated[float, Opt(
        "Weight of the dense reward: the reference's log-likelihood of each token, given a part of the finished image.",
        RL, least=0)] = 1.0,
    hindsight_share: Annotated[float, Opt("Share of the tokens that are hidden from the reference.", RL, above=0,
                                          most=1)] = 0.75,
    train_steps: Annotated[int | None, Opt("Steps of each rollout that enter the loss. [default: all]", RL,
                                           least=1)] = None,
    guidance: Annotated[float | None, Opt(
        "Guidance scale of the policy; 1 is none. [default: 1 if the model's is below 2, else the model's]", SAMPLER,
        ("--guidance", "--guidance-scale"), least=1)] = None,
    reference_guidance: Annotated[float | None, Opt(
        "Guidance scale of the reference policy. [default: the model's]", SAMPLER, least=1)] = None,
    order: Annotated[str | None, Opt("Reveal order. [default: the model's]", SAMPLER, choices=ORDERS)] = None,
    schedule: Annotated[str | None, Opt(
        "Mask schedule: cosine, linear, square, arccos or power:X. [default: the model's]", SAMPLER)] = None,
    temperature: Annotated[float | None, Opt(
        "Temperature of the reveal order at the first step. [default: the model's]", SAMPLER, least=0)] = None,
    remask: Annotated[float | None, Opt(
        "Share of the tokens that the last quarter of 6 steps or more draws again. [default: 0.5]", SAMPLER, least=0,
        most=1)] = None,
    shared_noise: Annotated[bool | None, Opt(
        "All positions of a step draw their tokens by the same noise, so that few steps agree. [default: on, but with "
        "--likelihood exact, which is that of independent draws]", SAMPLER,
        ("--shared-noise/--no-shared-noise",))] = None,
    search: Annotated[int, Opt("Rounds of search for the sampler's scalars before training; 0: none.", SAMPLER,
                               least=0)] = 64,
    quality_gate: Annotated[float | None, Opt("Quality under which speed earns nothing. [default: none]",
                                              REWARD)] = None,
    quality_clip: Annotated[float | None, Opt("Deviations from its mean past which a quality does not count.", REWARD,
                                              least=0)] = None,
    reward_weights: Annotated[Sequence[str], Opt(REWARD_WEIGHTS, REWARD, cli=list[str])] = (),
    micro_batch: Annotated[int, Opt("Images of one backward pass; halved where memory runs out.", MEMORY,
                                    least=1)] = 16,
    checkpointing: Annotated[bool, Opt("Compute blocks again in the backward pass: slower, less memory.",
                                       MEMORY)] = False,
    bf16: Annotated[bool | None, Opt("Compute in bf16. [default: if the device is fast at it]", MEMORY,
                                     ("--bf16/--no-bf16",))] = None,
    compile: Annotated[bool, Opt("Use torch.compile; not with fsdp.", MEMORY)] = True,
    parallel: Annotated[str, Opt("Under torchrun: ddp, each rank the whole model; fsdp, each a part.", RANKS,
                                 choices=("ddp", "fsdp"))] = "ddp",
    offload: Annotated[bool, Opt("With fsdp: weights stay in the processor's memory between uses.", RANKS)] = False,
    trackers: Annotated[Sequence[str], Opt("tensorboard or wandb, beside metrics.jsonl.", OUTPUT, ("--tracker",),
                                           cli=list[str], choices=TRACKERS)] = (),
    ema: Annotated[float, Opt("Decay of the moving average of the weights that is saved; 0: none.", OUTPUT, least=0,
                              below=1)] = 0.9,
    save_every: Annotated[int, Opt("Iterations between checkpoints.", OUTPUT, least=1)] = 10,
    text_encoder: TextEncoder = None,
    size: Size = None,
    negative_prompt: NegativePrompt = None,
    micro_conds: MicroConds = None,
    step_policy: Callable[[Tensor, int], torch.nn.Module] = StepPolicy,
    steps_lr: float = 0.1, warmup: int = 5, clip_grad: float = 1.0, max_skipped: int = 10, keep_checkpoints: int = 3,
    lora_alpha: float | None = None, lora_targets: str | None = None,
) -> Path:
    """Trains `model` to need fewer steps and saves it: to OUT/model, or with `lora`, a rank, to OUT/adapter.

    The method (Speed-RL, arXiv 2512.01094): each iteration draws `group_size` images of `groups` prompts. The reward of
    an image is its quality plus `steps_reward` times the share of the halvings of the steps that it saved, in units of
    the base's own quality gap between its most steps and one (`quality_gap`). None is 0.5, or 0 where there is one step
    count or `quality` is "none". Advantages within the groups train the policy by `updates` updates on `grpo_loss`. The
    reference policy is the model before training. A step policy learns how many steps each prompt takes
    (`method.steps`), and tokens are compared with tokens of equal step count (`count_residuals`).

    `model` may be a Generator, which is trained in place; `prompts` a file, a list, or None for those of the embedded
    model; `quality` what `load_qualities` takes, a function of images and prompts included; `likelihood` and `kl` a
    name, or a function of `method.ratios` and `method.divergences`; `step_policy` a class with StepPolicy's arguments.

    The learning rate rises over the first `warmup` iterations. An update whose gradient is not finite is skipped;
    `max_skipped` in a row end the training. Under torchrun, ranks share the groups; noise and prompts do not depend on
    their number. The model keeps the sampler's searched scalars.

    OUT/metrics.jsonl gets a line an iteration; OUT/checkpoints holds the newest `keep_checkpoints`, from which `resume`
    goes on exactly. Returns the folder of the model or adapter. ValueError and FileNotFoundError for what cannot be
    used, before anything is written; `Stopped` after SIGINT, SIGTERM or SIGHUP.
    """
    prompts = as_list(prompts)
    settings = check_settings(train, locals())
    choices, steps_reward = step_choices(steps), settings["steps_reward"]
    most, sharded = int(choices.max()), parallel == "fsdp"
    likelihood = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood
    kl = DIVERGENCES[kl] if isinstance(kl, str) else kl
    device = distributed.join(pick_device(device), parallel=parallel)
    bf16 = bf16_is_fast(device) if bf16 is None else bf16
    compile = compile and can_compile(device)
    load = partial(load_generator, model, text_encoder=text_encoder, size=size, negative=negative_prompt,
                   micro_conds=micro_conds)
    texts, generator = training_prompts(model, prompts), load(device=device)
    sampler = training_sampler(generator.sampler, most=most, guidance=guidance, order=order, schedule=schedule,
                               temperature=temperature, remask=remask,
                               shared_noise=settings["shared_noise"])
    reference_guidance = generator.sampler.guidance if reference_guidance is None else reference_guidance
    settings = check_sampler(settings, generator, sampler, reference_guidance, most=most) | {"bf16": bf16}
    reward = open_reward(quality, generator, reward_weights, clip=quality_clip, bf16=bf16, device=device, prompts=texts)
    choices = choices.to(device)
    learner = new_learner(
        generator, choices, reference=bool(kl_weight or hindsight), lr=lr, steps_lr=steps_lr, ema=ema,
        step_policy=step_policy, lora=lora, lora_alpha=lora_alpha, lora_targets=lora_targets, seed=seed,
        checkpointing=checkpointing, compile=compile, parallel=parallel, offload=offload, bf16=bf16, device=device)
    empty, random = encode_prompts(generator, [generator.negative]), torch.Generator().manual_seed(seed)
    autocast = bf16_autocast(device, enabled=bf16)
    samples, local = groups * group_size, distributed.local_slice(groups, times=group_size)
    length, of_group = generator.grid[0] * generator.grid[1], torch.arange(groups).repeat_interleave(group_size)
    batches = MicroBatches(micro_batch, undo=learner.optimizer.zero_grad, halve=not sharded)
    grouped, flat = (partial(rearrange, pattern=p, n=group_size) for p in ("(g n) -> g n", "g n -> (g n)"))

    with open_run(Path(out), settings, iterations=iterations, resume=resume, trackers=trackers, save_every=save_every,
                  keep_checkpoints=keep_checkpoints, max_skipped=max_skipped, sharded=sharded) as run:
        record = run.restore(learner.learned, learner.optimizer, learner.average, random, device)
        reward.restore(record)
        warn_of_prompts(run.warn, generator, texts, (sampler.guidance, reference_guidance))
        if "gap" not in record:
            run.stage(f"searching the sampler, {search} rounds" if search else "measuring the base", total=search + 2)
        with autocast, distributed.gathered_weights(learner.transformer, sharded=sharded):
            stages = partial(prepare_sampler, record, generator, texts, reward, sampler, choices, rounds=search,
                             seed=seed, between=run.advance)
            sampler, gap = distributed.on_all_ranks(stages)
        run.stage("compiling: the first iteration takes a minute or two" if compile else "the first iteration")
        decide, scoring = (compiled_step(), compiled_score()) if compile else (step, score_logits)
        for iteration in run.iterations():
            # ROLLOUT of this rank's samples; prompts, counts and noise do not depend on the number of ranks
            began, compiling = time.time(), compile_seconds()
            chosen = [texts[i] for i in draw_prompts(len(texts), groups, random)]
            asked = [text for text in chosen for _ in range(group_size)][local]
            prompt = index_prompts(encode_prompts(generator, chosen), of_group.to(device))
            drawn = draw_steps(learner.step_log_probs(prompt.pooled), torch.rand(samples, generator=random).to(device))
            counts = choices[drawn]
            policy = Policy(learner.transformer, prompt, empty, sampler.guidance, generator.grid, generator.mask_id)
            policy, reference = policy[local], learner.reference_for(policy[local], reference_guidance)
            noise = draw_noise(len(asked), most, length, seed=seed, first=iteration * samples + local.start,
                               codes=generator.codes if sampler.shared_noise else 0, device=device)
            with autocast, distributed.gathered_weights(learner.transformer, sharded=sharded):
                trajectory = rollout(policy, counts[local], noise, sampler, step=decide)

            # REWARD of all ranks' samples: quality, and speed in units of the base's quality gap
            images = decode(generator, trajectory.tokens, bf16=bf16)
            parts = distributed.gathered_parts(distributed.on_all_ranks(partial(reward.parts, images, asked)))
            qualities = reward.observe(parts, samples)
            speed = speed_reward(counts, max_steps=most)
            rewards = combine(qualities, speed, steps_reward=steps_reward * gap, gate=quality_gate)

            # ADVANTAGE within the group of a prompt, at equal step count; the advantages of what is kept sum to 0
            residuals, known = count_residuals(grouped(qualities), grouped(counts))
            keep = known * std_percentile(residuals, percentile=percentile, keep=known)
            keep = keep * low_quality(residuals, threshold=min_quality)
            residuals, known = count_residuals(grouped(qualities), grouped(counts), keep=keep)
            advantages = flat(group_advantages(residuals, std=advantage_std, keep=known))
            keep = flat(known.float())
            step_advantages = flat(leave_one_out(grouped(rewards))) / gap

            # UPDATE; the step policy takes one step for each rollout
            learner.warm_up(lr, iteration, warmup)
            finished = hide(trajectory.tokens, torch.rand(samples, length, generator=random)[local].to(device),
                            share=hindsight_share, mask_id=generator.mask_id) if hindsight else None
            scale = samples / keep.sum().clamp(min=1)  # the kept samples count for all in the policy loss
            for update in range(updates):
                trained = trained_steps(counts, train_steps, random)[local]
                for index in batches.over(torch.arange(len(asked), device=device)):
                    with batches, autocast:
                        loss, stats = grpo_loss(
                            policy[index], reference and reference[index], trajectory[index], advantages[local][index],
                            scale * keep[local][index], trained[index], likelihood=likelihood, clip_range=clip_range,
                            kl=kl, kl_weight=kl_weight, hindsight=hindsight,
                            finished=None if finished is None else finished[index], on_policy=updates == 1,
                            score_logits=scoring)
                        loss = loss * (1 + 0 * loss.detach())  # what is not finite has a gradient that is not either
                        (loss / (samples * length)).backward()
                        batches.add(stats)
                if update == 0 and learner.step_policy is not None:
                    log_p = learner.step_log_probs(prompt.pooled)
                    (step_loss(log_p[local], drawn[local], step_advantages[local]) / samples).backward()
                norm = learner.step(clip_grad=clip_grad)
                if run.update_was_finite(bool(norm.isfinite()), iteration=iteration):
                    learner.update_average(decay=ema, updates=iteration)

            # METRICS and checkpoints
            totals = distributed.total_stats(batches.totals)
            row = iteration_metrics(iteration + 1, rewards, grouped(qualities), counts, keep, norm, totals)
            compiling = compile_seconds() - compiling
            rate = {"images_per_second": samples / (time.time() - began - compiling), "compile_seconds": compiling}
            run.log(row | part_means(parts) | rate)
            run.check(spread=row["group_std"] > 0 or not reward.scores, falling=reward.falling())
            table = None if sampler.scalars is None else sampler.scalars.tolist()
            run.save(iteration + 1, reward.record() | {"search": table, "gap": gap})

        weights = distributed.whole(learner.average or learner.learned)
        saved_to = Path(out)
        with unsaved(run.saved):
            if distributed.is_main():
                whole = whole_generator(load, settings) if sharded else generator
                saved_to = save_trained(saved_to, whole, weights, sampler, settings)
    distributed.leave()
    return saved_to


def prepare_sampler(
    record: Mapping[str, Any],
    generator: Generator,
    prompts: Sequence[str],
    reward: Reward,
    sampler: Sampler,
    choices: Tensor,
    *,
    rounds: int,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Sampler, float]:
    """The sampler with its searched scalars, and the quality gap: those of a checkpoint's record, or new.

    `rounds` of search start from the sampler's own scalars, if it has any; the gap is that of the searched sampler.
    `between` is called after each batch of images: what it raises ends the stage.
    """
    if "gap" in record:
        table = record["search"]
        return sampler if table is None else sampler.replace(scalars=torch.tensor(table)), record["gap"]

    def quality(images: Tensor, texts: list[str]) -> Tensor:
        between()
        return reward.observe(reward.parts(images, texts), len(texts)).cpu()

    if rounds and reward.scores:
        sampler = search_sampler(generator, prompts, quality, choices.cpu(), sampler=sampler, rounds=rounds, seed=seed)
    gap = 1.0
    if reward.scores and len(choices) > 1:
        gap = quality_gap(generator, prompts, quality, int(choices.max()), sampler=sampler, seed=seed)
    reward.recent.clear()  # the qualities of these stages are of other samplers, no trend of the training
    return sampler, gap
