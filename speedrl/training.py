"""The training loop: GRPO on the rollouts of a masked image generator."""

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from speedrl.generation import guided_policy
from speedrl.method.advantages import early_advantages, group_advantages
from speedrl.method.critic import reward_slopes
from speedrl.method.filters import low_quality, std_percentile
from speedrl.method.rewards import Moments, combine, disagreeing, mixture, observe, speed_reward
from speedrl.method.sampling import compiled_step, draw_noise, rollout, step
from speedrl.method.schedules import StepRange, step_range
from speedrl.method.search import OCTAVES, SPREAD, Tuning, described, improved, tunings
from speedrl.models.checkpoint import (
    codebook,
    decode,
    decode_embeddings,
    encode_prompts,
    find,
    fitting_batch,
    load_generator,
    paced,
    parameters,
    take,
)
from speedrl.models.lora import WithoutLora, add_lora
from speedrl.pace import SWEEP, divided, every_stop, expected
from speedrl.rewards.loading import load_qualities, rate
from speedrl.run import distributed
from speedrl.run.checkpoints import (
    append_row,
    changed,
    drop_metrics,
    plain,
    random_states,
    restore,
    save,
    start,
    tensors,
)
from speedrl.run.display import Display
from speedrl.run.distributed import agreed, gathered, total
from speedrl.run.exporting import save_trained
from speedrl.run.prompts import open_prompts
from speedrl.run.settings import check, doubtful, kind_of_credit
from speedrl.run.trackers import open_trackers
from speedrl.system.errors import Stopped, interruptible, unsaved
from speedrl.system.platform import bf16_autocast, bf16_is_fast
from speedrl.updates import descend, fitting, follow, gradients, pace_gradient, token_weights, trained_steps
from speedrl.value import guesses, step_credit

TREND = 20  # iterations over which rewards are watched for disagreement


def training_prompts(model: str, prompts: str | Path | None = None) -> Sequence[str]:
    """The prompts to train on: those of `open_prompts`, or without any given those that come with the embedded model.
    ValueError for another model, which has none."""
    if prompts:
        return open_prompts(prompts)
    if model != "embedded":
        raise ValueError(f"{model} comes without prompts: give a file with one prompt a line by --prompts")
    return open_prompts(find(model) / "prompts/train.txt")


def draw_prompts(count: int, groups: int, random: torch.Generator) -> Tensor:
    """Which of `count` prompts the groups of an iteration have: int64 [groups], each once before any twice."""
    rounds = [torch.randperm(count, generator=random) for _ in range(-(-groups // count))]
    return torch.cat(rounds)[:groups]


def draw_steps(bounds: StepRange, groups: int, group_size: int, random: torch.Generator, *, shared: bool) -> Tensor:
    """Step counts of the samples, int64 [groups * group_size], one for each group if `shared`; where the policy
    chooses, those that reveal.

    N steps are drawn with a probability in proportion to log2((N + 1) / N), so that 1, 2 to 3, 4 to 7 and so on are
    drawn equally often: what is learned at 15 steps serves 16, but that at 1 does not serve 2. An iteration's draws
    are stratified: its n counts fall one into each n-th of the distribution, so that every iteration has few and many.
    """
    at = torch.rand(groups * group_size, generator=random).double()
    if bounds.chosen:
        return torch.full((groups * group_size,), divided(bounds.most)[0])
    at = at[:groups] if shared else at
    if bounds.drawn:
        at = (torch.randperm(len(at), generator=random) + at) / len(at)
    counts = (bounds.least * ((bounds.most + 1) / bounds.least) ** at).long()
    return counts.repeat_interleave(group_size) if shared else counts


def measured(
    iteration: int, rewards: Tensor, by_group: Tensor, speed: Tensor, keep: Tensor, totals: Mapping[str, float],
    norm: Tensor,
) -> dict[str, float]:  # fmt: skip
    """A row of metrics: rewards and speed [B], qualities and keep [G, n], what `gradients` summed, its norm."""
    kept = max(totals["kept"], 1)
    return {
        "iteration": iteration,
        "reward": rewards.mean().item(),
        "quality": by_group.mean().item(),
        "speed": speed.mean().item(),
        "group_std": by_group.std(-1).mean().item(),
        "kl": totals["kl"] / kept,
        "clip_fraction": totals["clip_fraction"] / kept,
        "ratio_max": totals["ratio_max"],
        "grad_norm": norm.item(),
        "kept": keep.mean().item(),
    }


def train(
    *,
    out: str | Path = "runs/train",
    model: str = "embedded",
    prompts: str | Path | None = None,
    quality: str = "embedded",
    steps: str = "4",
    shared_steps: bool = True,
    pace_lr: float = 0.2,
    steps_reward: float = 0.0,
    quality_gate: float | None = None,
    quality_clip: float | None = None,
    reward_weights: Sequence[str] = (),
    iterations: int = 40,
    groups: int = 8,
    group_size: int = 8,
    lr: float = 5e-5,
    warmup: int = 5,
    eps: float = 1e-8,
    guidance: float = 1.0,
    reference_guidance: float | None = None,
    temperature: float | None = None,
    schedule: str | None = None,
    order: str | None = None,
    revise: float = 0.5,
    likelihood: str = "token",
    clip_range: float = 0.2,
    kl: str = "ce",
    kl_weight: float = 0.2,
    kl_falloff: float = 2.0,
    percentile: float = 0.0,
    least_quality: float | None = None,
    trained: int | None = None,
    tune: bool = True,
    tune_rate: float = 2.0,
    credit: str | None = None,
    gae_lambda: float = 0.0,
    early_credit: float = 0.0,
    lora: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: str | None = None,
    merge: bool = False,
    ema: float = 0.9,
    checkpointing: bool = False,
    updates: int = 1,
    micro_batch: int = 16,
    clip_grad: float = 1.0,
    max_skipped: int = 10,
    seed: int = 0,
    save_every: int = 10,
    keep_checkpoints: int = 3,
    resume: bool = False,
    parallel: str = "ddp",
    offload: bool = False,
    trackers: Sequence[str] = (),
    compile: bool = True,
    bf16: bool | None = None,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Trains `model` to need fewer network calls, and saves it to OUT/model in the layout it was loaded from.

    With `lora`, a rank, an adapter is trained in place of the weights and saved to OUT/adapter in peft's layout; OUT is
    then a model as well, and with `merge` OUT/model is saved too (`add_lora` for alpha and targets). What is saved
    is the exponential moving average of the weights of decay `ema`, or the weights themselves at 0.

    Each iteration samples `group_size` pictures of `groups` prompts in `steps` steps ("4"; "2-16": drawn anew, every
    octave as often; "auto:8", or "auto": at most 8, of which the policy chooses when to stop, see `pace`), rewards each
    with its quality (`mixture`) plus steps_reward times `speed_reward`, and makes `updates` updates on the clipped loss
    plus kl_weight times the divergence from the starting model at the revealed tokens, of fewer than 16 steps times
    (steps / 16) ** kl_falloff (`count_weights`).
    That model is the reference policy as it is used, at its own guidance unless `reference_guidance` says another: so
    a policy that samples without guidance, one call a step in place of two, is drawn to what guidance gives.
    Pictures of a group share the count that is drawn unless `shared_steps` is off: advantages then compare pictures of
    equal cost, with less variance, as what the count alone brings is in the group's mean; a speed reward cancels there
    too. Where the policy chooses, its head learns at the rate `pace_lr`, and a picture's reward is what its decisions
    let expect.
    With `credit` "token", the default where likelihood and reward allow it, tokens have what the reward would change by
    with another one there, to first order (`critic`), and the first tokens `early_credit` times the advantage of the
    whole rollout beside it (`early_advantages`); with "step" every token of a step has what the step changed of
    its state's value (`value`), and with `gae_lambda` above 0 a share of what later steps changed; with
    "rollout" the advantage of the whole rollout, as in the paper.
    With `tune` a few scalars of the sampler are learned for each step count, from `tune_rate`, less later (`tuning`).
    `checkpointing` computes each block again in the backward pass, for memory; `micro_batch` is halved where memory
    runs out. `trained` steps of each rollout, all by default, enter the loss, scaled so that its gradient is that of
    all in expectation. `percentile` and `least_quality` filter groups and samples (`std_percentile`, `low_quality`).
    The learning rate rises to `lr` over the first `warmup` iterations, as Adam's first updates are as large as any and
    follow one rollout's noise. `eps`, Adam's, is beside the root mean square of a weight's gradient: far above it
    weights move in proportion to their gradient, far below it, as by default, all alike, those with nothing but noise
    too. An update whose gradient is not finite is skipped; `max_skipped` in a row end the
    training.
    `temperature`, the mask `schedule` and the reveal `order` None are the model's own. The saved model draws the share
    `revise` of its tokens again (`revise_tokens`); of a rollout what is revealed trains, and only where the policy
    chooses are sweeps drawn at all, for their rewards. With `bf16`, by default where `bf16_is_fast`, products are
    computed in bfloat16, weights and what is summed stay float32.
    `loading` holds further options of `load_generator`, which the saved model keeps.

    Under torchrun, groups are shared by its ranks: with `parallel` "ddp" each has the whole model, with "fsdp" a part
    of it, on the processor between uses with `offload`. The noise and the prompts do not depend on their number.

    OUT/metrics.jsonl gets a line an iteration, which `trackers` get as well; OUT/checkpoints holds the newest
    `keep_checkpoints`. With `resume` the newest that is whole goes on exactly, or the training starts where there is
    none yet. Returns the folder of the model or adapter. ValueError and FileNotFoundError for what cannot be used,
    before anything is written; `Stopped` after SIGINT or SIGTERM.
    """
    settings = plain(locals())
    out, bounds = Path(out), step_range(steps)
    check(settings, bounds)
    device = distributed.join(device, parallel=parallel)
    bf16 = settings["bf16"] = bf16_is_fast(device) if bf16 is None else bf16
    mine, sharded, loud = distributed.share(groups), parallel == "fsdp", distributed.rank() == 0
    size, mine = groups * group_size, slice(mine.start * group_size, mine.stop * group_size)  # of samples
    texts = training_prompts(model, prompts)
    adapted = {"rank": lora, "alpha": lora_alpha, "targets": lora_targets, "seed": seed}
    generator = paced(load_generator(model, device=device, **(loading or {})), bounds)
    length, grid = generator.grid[0] * generator.grid[1], generator.grid
    if bounds.most > length:
        raise ValueError(f"{bounds.most} steps are more than the {length} tokens of a picture")
    temperature = generator.temperature if temperature is None else temperature
    reference_guidance = generator.guidance if reference_guidance is None else reference_guidance
    schedule, order = schedule or generator.schedule, order or generator.order
    settings |= {"temperature": temperature, "reference_guidance": reference_guidance, "schedule": schedule,
                 "order": order}  # fmt: skip
    scores, shares = load_qualities(quality, device=device, weights=reward_weights, bf16=bf16)
    credit = settings["credit"] = kind_of_credit(credit, likelihood, scores, shares, device=device)

    empty = encode_prompts(generator, [generator.negative])
    transformer, pace = generator.transformer, generator.pace
    if lora is not None:
        add_lora(transformer, **adapted)
    reference = None
    if kl_weight and kl != "none":
        reference = copy.deepcopy(transformer).requires_grad_(False) if lora is None else WithoutLora(transformer)
    transformer.gradient_checkpointing = checkpointing
    for network in (transformer, reference) if reference is not None else (transformer,):
        if compile and not sharded:  # compiled blocks that gather their weights are not verified yet
            network.compile_blocks()
        if sharded and isinstance(network, nn.Module):
            own = pace if network is transformer else None
            distributed.shard(network, own, device=device, offload=offload, bf16=bf16)
    learned = {name: p for name, p in parameters(generator).items() if p.requires_grad}
    rates = [{"params": [p for name, p in learned.items() if not name.startswith("pace.")]}]
    rates += [] if pace is None else [{"params": list(pace.parameters()), "lr": pace_lr}]
    optimizer = torch.optim.AdamW(rates, lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)
    average = {name: p.detach().clone() for name, p in learned.items()} if ema else {}
    random = torch.Generator().manual_seed(seed)
    checkpoint, complaints = start(out, resume=resume)
    record = restore(checkpoint, learned, optimizer, average, random, device) if checkpoint else {}
    by_token, by_step = credit == "token", credit == "step"
    codes, at_once = codebook(generator) if by_token else None, fitting_batch(generator)
    table = torch.tensor(record["tuning"]) if record.get("tuning") else generator.tuning
    table = torch.zeros(OCTAVES, len(SPREAD)) if table is None and tune else table
    seen = torch.tensor(record.get("tuned", [0.0] * OCTAVES))  # batches that each octave's tuning has learned from
    first, skipped, lost = (record.get(name, 0) for name in ("iteration", "skipped", "skipped_total"))
    fit = torch.tensor(record.get("fit", [[0.0] * 4] * 3), dtype=torch.float64)  # of values to guesses
    moments = {name: Moments(*record.get("moments", {}).get(name, ())) for name in scores}
    recent = deque((row for row in record.get("recent", ()) if row.keys() == scores.keys()), maxlen=TREND)
    autocast, saved, unwritten = bf16_autocast(device, enabled=bf16), first, []
    of_group = torch.arange(groups).repeat_interleave(group_size)[mine].to(device)
    if loud and resume:
        drop_metrics(out, first)
    track = open_trackers(trackers if loud else (), out, settings)

    def judged(pictures: Tensor, texts: list[str]) -> dict[str, Tensor]:
        return {name: rate(name, score, pictures, texts).to(device) for name, score in scores.items()}

    def valued(tokens: Tensor, texts: list[str]) -> Tensor:
        pictures = decode(generator, tokens, bf16=bf16)
        return mixture(judged(pictures, texts), shares, moments, clip=quality_clip)

    def sloped(embeddings: Tensor, texts: list[str]) -> Tensor:
        pictures = decode_embeddings(generator, embeddings, bf16=bf16)
        return mixture(judged(pictures, texts), shares, moments, clip=quality_clip)

    sampler = {"length": length, "mask_id": generator.mask_id, "temperature": temperature, "schedule": schedule,
               "order": order, "grid": grid, "record": likelihood == "exact", "sparse": True, "guess": by_step,
               "step": compiled_step(device) if compile else step, "summarise": bounds.chosen}  # fmt: skip
    objective = {"mask_id": generator.mask_id, "autocast": autocast, "grid": grid, "guidance": guidance,
                 "reference_guidance": reference_guidance, "order": order, "likelihood": likelihood,
                 "clip_range": clip_range, "kl": kl, "kl_weight": kl_weight, "kl_falloff": kl_falloff,
                 "codes": codes}  # fmt: skip
    of_credit = {"mine": mine, "group_size": group_size, "gae_lambda": gae_lambda, "steps_reward": steps_reward,
                 "max_steps": bounds.most}  # fmt: skip

    display = Display(first=first, total=iterations, console=Console(quiet=not loud))
    with display, interruptible() as stopped, distributed.lost_contact():
        others = (f"going on with other settings: {line}" for line in changed(record.get("settings", {}), settings))
        for line in [*complaints, *doubtful(settings, bounds), *others]:
            display.warn(line)
        for iteration in range(first, iterations):
            began = time.time()

            # SAMPLING, of this rank's share; its noise and prompts do not depend on the number of ranks
            chosen = [texts[i] for i in draw_prompts(len(texts), groups, random)]
            asked = [text for text in chosen for _ in range(group_size)][mine]
            counts = draw_steps(bounds, groups, group_size, random, shared=shared_steps).to(device)
            noise = draw_noise(mine.stop - mine.start, bounds.most, length, seed=seed,
                               first=iteration * size + mine.start, device=device)  # fmt: skip
            prompt = take(encode_prompts(generator, chosen), of_group)
            tuning, tried = tunings(table, counts, explore=tune, seed=seed, iteration=iteration)
            policy = guided_policy(transformer, prompt, empty, guidance=guidance, grid=grid, summarise=bounds.chosen)
            own = None if tuning is None else Tuning(*(part[mine] for part in tuning))
            with autocast, distributed.gathered_weights(transformer, pace, sharded=sharded):
                batch = rollout(policy, counts[mine], noise, tuning=own, **sampler)
                stops = every_stop(policy, pace, batch, noise.uniform, share=revise, grid=grid,
                                   mask_id=generator.mask_id, sharpness=own and own.last)  # fmt: skip
            logits, sweeps = gathered(stops.logits), torch.arange(stops.tokens.shape[1], device=device)
            taken = counts[:, None] + SWEEP * sweeps  # [B, K + 1], the steps wherever the policy may stop

            # REWARDS at each stop, [B, K + 1], and what to expect of them, of all ranks' samples on every rank
            pictures = decode(generator, stops.tokens.flatten(0, 1), bf16=bf16)
            of_each = [text for text in asked for _ in sweeps]
            scored = agreed(lambda: judged(pictures, of_each))  # noqa: B023
            parts = {name: gathered(part) for name, part in scored.items()}
            moments = {name: observe(moments[name], part) for name, part in parts.items()}
            qualities = mixture(parts, shares, moments, clip=quality_clip).view(taken.shape)
            speeds = speed_reward(taken, max_steps=bounds.most).to(qualities)
            at_stop = combine(qualities, speeds, steps_reward=steps_reward, gate=quality_gate)
            quality_of, speed, rewards = (expected(logits, values) for values in (qualities, speeds, at_stop))  # [B]
            by_group = quality_of.view(groups, -1)
            keep = std_percentile(by_group, percentile=percentile) * low_quality(by_group, threshold=least_quality)

            # ADVANTAGES [b, S] of each step and, with credit "token", slopes [b, L, C], in the rewards' deviations
            above = group_advantages(rewards.view(groups, -1), scale=False).flatten()
            scale, slopes = 1 / (above.square().mean().sqrt() + 1e-4), None
            if tune:
                table, seen = improved(table, seen, counts, tried, above, rate=tune_rate)
            if by_token:
                by_size = lambda n: scale * reward_slopes(batch.tokens, codes, sloped, asked, batch=n)  # noqa: B023, E731
                slopes, at_once = agreed(lambda: fitting(by_size, at_once))  # noqa: B023
                early = early_credit * scale * above[mine]
                advantages = early_advantages(early, batch.reveal_step, batch.countdown.shape[1])
            elif by_step:
                guessed = agreed(lambda: guesses(batch, asked, valued))  # noqa: B023
                advantages, fit = step_credit(batch, guessed, rewards, quality_of, fit, **of_credit)
            else:
                advantages = group_advantages(rewards.view(groups, -1)).view(-1, 1)[mine].expand(batch.countdown.shape)

            # TRAINING
            optimizer.param_groups[0]["lr"] = lr * min(1, (iteration + 1) / (warmup + 1))
            for _ in range(updates):
                which = trained_steps(counts, trained, random)[mine]  # bool [B, S]
                weights = token_weights(batch, which, keep.flatten()[mine])  # [B, L]
                kept = keep.sum() * length  # of all steps and all ranks, whichever train
                add = lambda n: gradients(transformer, reference, batch, which, prompt, empty, advantages,  # noqa: B023, E731
                                          weights, kept, slopes=slopes, micro_batch=n, **objective)  # noqa: B023  # fmt: skip
                totals, micro_batch = fitting(add, micro_batch, undo=optimizer.zero_grad, halve=not sharded)
                if pace is not None:
                    pace_gradient(pace, stops.known, scale * at_stop[mine], size=size)
                norm = descend(optimizer, clip_grad=clip_grad, sharded=sharded)
                skipped, lost = (0, lost) if norm.isfinite() else (skipped + 1, lost + 1)
                if skipped:
                    display.warn(f"iteration {iteration + 1}: the gradient is not finite; its update is skipped")
                else:
                    follow(average, learned, decay=ema, updates=iteration)
                if skipped >= max_skipped:
                    advice = "lower --lr or --clip-grad, or raise --kl-weight, and go on with --resume"
                    raise ValueError(f"{skipped} updates in a row had a gradient that is not finite: {advice}")

            # METRICS and checkpoints
            done = iteration + 1
            row = measured(done, rewards, by_group, speed, keep, distributed.total_stats(totals), norm)
            row |= {"skipped": skipped, "skipped_total": lost, "images_per_second": size / (time.time() - began)}
            if reference is None:
                del row["kl"]  # 0 would say that it was measured
            if bounds.least < bounds.most:
                row["steps_mean"] = expected(logits, taken.to(logits)).mean().item()
            if tune:
                row |= described(table, counts)
            if len(parts) > 1:
                row |= {name: expected(logits, part.view(taken.shape)).mean().item() for name, part in parts.items()}
                recent.append({name: row[name] for name in parts})
                if falling := disagreeing(recent, shares):
                    display.warn(f"the reward rises while {' and '.join(falling)} falls: it may be gamed")
            display.show(row)
            for problem in (append_row(out, row, unwritten), *track(row)) if loud else ():
                display.warn(problem) if problem else None
            stop = int(total(torch.tensor(stopped()), largest=True))
            if done % save_every == 0 or done == iterations or stop:
                record = {"skipped": skipped, "skipped_total": lost, "moments": moments, "fit": fit.tolist(),
                          "recent": list(recent), "tuning": None if table is None else table.tolist(),
                          "tuned": seen.tolist(), "settings": settings}  # fmt: skip
                try:
                    save(out, done, tensors(learned, optimizer, average), random_states(random, device), record,
                         keep=keep_checkpoints, sharded=sharded)  # fmt: skip
                    saved = done
                except OSError as error:
                    display.warn(f"{error}; training goes on, and the checkpoints before it stand")
            if stop:
                what = f"stopped after iteration {done}" + ("" if saved == done else f", of which {saved} are saved")
                raise Stopped(f"{what}; go on with the same command and --resume", stop)

    weights = distributed.whole(average or learned)
    if loud and sharded:
        generator = paced(load_generator(model, **(loading or {})), bounds)
        if lora is not None:
            add_lora(generator.transformer, **adapted)
    with unsaved(saved):
        saved_to = save_trained(out, generator, weights, table, settings) if loud else out
    distributed.leave()
    return saved_to
