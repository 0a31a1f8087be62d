"""The training loop: GRPO on the rollouts of a masked image generator."""

import copy
import json
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speedrl import __version__
from speedrl.advantage import group_advantages
from speedrl.display import Display
from speedrl.files import write_atomically
from speedrl.filter import low_quality, std_percentile
from speedrl.kl import kl as divergence
from speedrl.likelihood import exact_log_prob, guided, log_probs, log_ratio
from speedrl.loss import clipped_loss, normalise
from speedrl.models.checkpoint import (
    Prompts,
    adapter_of,
    decode,
    encode_prompts,
    find,
    load_generator,
    repeat,
    save_generator,
    take,
)
from speedrl.models.lora import WithoutLora, add_lora, merge_lora, save_lora
from speedrl.platform import bf16_autocast
from speedrl.prompts import read_prompts
from speedrl.reward import Moments, combine, disagreeing, load_qualities, mixture, observe, speed_reward
from speedrl.rollout import ORDERS, Rollout, draw_noise, rollout, state
from speedrl.sample import guided_policy
from speedrl.schedule import mask_ratio, temperatures, timesteps

TREND = 20  # iterations over which rewards are watched for disagreement


class Rows(NamedTuple):
    """States of a micro-batch, one row for each sample and step that trains. R rows, K places of a row."""

    sample: Tensor  # int64 [R], which sample of the micro-batch
    step: Tensor  # int64 [R]
    tokens: Tensor  # int64 [R, L], what the policy saw
    timestep: Tensor  # int64 [R]
    places: Tensor  # int64 [R, K], where the log-probabilities are needed
    targets: Tensor  # int64 [R, K], the tokens drawn there
    revealed: Tensor  # bool [R, K], False for padding


def step_range(text: str) -> tuple[int, int]:
    """Reads "8" as (8, 8) and "2-16" as (2, 16). ValueError otherwise, and for counts under 1."""
    low, _, high = str(text).partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"steps must be a number or a range, like 8 or 2-16, not {text!r}") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"steps must be at least 1 and a range must rise, not {text!r}")
    return bounds


def rows(batch: Rollout, keep: Tensor, *, mask_id: int, every_place: bool = False) -> Rows:
    """Replays the states of the steps in `keep`, bool [B, S]; with `every_place` for all places, not the revealed."""
    sample, step = keep.nonzero(as_tuple=True)
    part = Rollout(*(None if field is None else field[sample] for field in batch))
    tokens = state(part, step, mask_id=mask_id)
    revealed = part.reveal_step == step[:, None]
    if every_place:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        drawn = part.drawn[torch.arange(len(step)), step]
    else:
        most = int(revealed.sum(-1).max())
        places = revealed.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
        drawn = part.tokens
    countdown = timesteps(batch.steps)[sample, step]
    return Rows(sample, step, tokens, countdown, places, drawn.gather(1, places), revealed.gather(1, places))


def place_logits(
    transformer: nn.Module, part: Rows, prompts: Prompts, empty: Prompts, *, guidance: float, grid: tuple[int, int]
) -> Tensor:
    """Guided logits at the rows' places, float32 [R, K, V]: the head runs there only."""

    def at_places(tokens: Tensor, timestep: Tensor, prompts: Prompts, places: Tensor) -> Tensor:
        features = transformer.features(tokens.unflatten(1, grid), timestep, *prompts)
        return transformer.head(features.gather(1, places[..., None].expand(-1, -1, features.shape[-1])))

    if guidance == 1:
        return at_places(part.tokens, part.timestep, prompts, part.places).float()
    both = Prompts(*(torch.cat(pair) for pair in zip(empty, prompts, strict=True)))
    twice = [torch.cat([x, x]) for x in (part.tokens, part.timestep, part.places)]
    uncond, cond = at_places(twice[0], twice[1], both, twice[2]).chunk(2)
    return guided(cond, uncond, guidance)


def trained_steps(steps: Tensor, count: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each sample train: bool [B, S], `count` of its N at random, all where count is None."""
    exists = torch.arange(int(steps.max())) < steps.cpu()[:, None]
    if count is None:
        return exists.to(steps.device)
    score = torch.rand(exists.shape, generator=generator).masked_fill(~exists, -1)
    return (exists & (score.argsort(dim=-1, descending=True).argsort(dim=-1) < count)).to(steps.device)


def accumulate(totals: dict[str, float], stats: dict[str, Tensor]) -> None:
    """Adds a micro-batch's statistics to `totals`: means by weight become sums, to be divided by "kept" at the end."""
    kept = stats["kept"].item()
    for name, value in stats.items():
        value = value.item()
        if name == "ratio_max":
            totals[name] = max(totals.get(name, 0.0), value)
        else:
            totals[name] = totals.get(name, 0.0) + (value if name in ("kept", "kl") else value * kept)


def check(settings: dict, bounds: tuple[int, int]) -> None:
    """ValueError for settings that cannot work together."""
    for name in ("iterations", "groups", "micro_batch", "updates", "save_every"):
        if settings[name] < 1:
            raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {settings[name]}")
    if settings["group_size"] < 2:
        raise ValueError("group-size must be at least 2: advantages compare the samples of one prompt")
    if settings["lr"] <= 0:
        raise ValueError(f"lr must be positive, got {settings['lr']}")
    if settings["kl"] not in ("ce", "reverse", "k1", "k2", "k3", "none"):
        raise ValueError(f"unknown divergence {settings['kl']!r}: choose ce, reverse, k1, k2, k3 or none")
    if settings["likelihood"] not in ("token", "sequence", "exact"):
        raise ValueError(f"unknown likelihood {settings['likelihood']!r}: choose token, sequence or exact")
    if settings["order"] not in (None, *ORDERS):
        raise ValueError(f"unknown reveal order {settings['order']!r}: choose confidence, random or halton")
    if settings["schedule"] is not None:
        mask_ratio(torch.zeros(()), kind=settings["schedule"])
    if not 0 <= settings["percentile"] <= 100:
        raise ValueError(f"percentile must be 0 to 100, got {settings['percentile']}")
    if settings["lora"] is not None and adapter_of(settings["model"]):
        raise ValueError(f"{settings['model']} is an adapter already: train it with --merge, and go on from that model")
    if settings["trained"] is not None and not 1 <= settings["trained"] <= bounds[0]:
        raise ValueError(f"trained must be 1 to the least number of steps, {bounds[0]}, got {settings['trained']}")


def training_prompts(model: str) -> list[str]:
    """The prompts that come with the embedded model. ValueError for another model, which has none."""
    if model != "embedded":
        raise ValueError(f"{model} comes without prompts: give a file with one prompt a line by --prompts")
    return read_prompts(find(model) / "prompts/train.txt")


def lasting(source: str | Path) -> str:
    """A folder's whole path, which holds from every working directory; a hub id or "embedded" as it is."""
    return str(Path(source).resolve() if Path(source).exists() else source)


def start(out: Path, settings: dict, *, resume: bool) -> None:
    """Makes the run's folder. ValueError where it holds another run, or none that could be resumed."""
    if resume and not (out / "checkpoint.pt").exists():
        raise ValueError(f"{out} has no checkpoint.pt to resume: leave --resume away to start a run there")
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run already: continue it with --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def save(
    out: Path, transformer: nn.Module, optimizer, random: torch.Generator, moments: dict[str, Moments], done: int,
    settings: dict,
) -> None:  # fmt: skip
    """Writes OUT/checkpoint.pt, whole or not at all: all that `restore` needs."""
    state = {
        "transformer": {name: p for name, p in transformer.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "random": random.get_state(),
        "moments": {name: tuple(values) for name, values in moments.items()},
        "iteration": done,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "version": __version__,
    }
    write_atomically(out / "checkpoint.pt", lambda partial: torch.save(state, partial))


def restore(
    out: Path, transformer: nn.Module, optimizer, random: torch.Generator, moments: dict[str, Moments]
) -> int:  # fmt: skip
    """Loads OUT/checkpoint.pt into place, drops metrics past it, returns its iteration. ValueError if it is damaged."""
    try:
        state = torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu")
        learned = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in state["transformer"].items():
                learned.pop(name).copy_(value)
        if learned:
            raise KeyError(next(iter(learned)))
        optimizer.load_state_dict(state["optimizer"])
        random.set_state(state["random"])
        moments |= {name: Moments(*values) for name, values in state["moments"].items() if name in moments}
    except Exception as error:  # torch has no common error for a damaged file
        what = f"{out / 'checkpoint.pt'} is damaged or another model's"
        raise ValueError(f"{what} ({type(error).__name__}): start the run anew in another folder") from error
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)[: state["iteration"]] if metrics.exists() else []
    write_atomically(metrics, lambda partial: partial.write_text("".join(lines)))
    return state["iteration"]


@contextmanager
def interruptible():
    """Turns the first Ctrl-C into a request, so that an iteration ends whole: yields a function that tells of it."""
    asked = []

    def ask(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt("stopped at once; the last checkpoint stands")
        asked.append(True)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def micro_batch_loss(
    transformer: nn.Module,
    reference: nn.Module | None,
    batch: Rollout,
    part: Rows,
    prompts: Prompts,
    empty: Prompts,
    advantages: Tensor,
    weights: Tensor,
    *,
    grid: tuple[int, int],
    guidance: float,
    temperature: float,
    order: str,
    likelihood: str,
    clip_range: float,
    kl: str,
    kl_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped loss plus weighted KL of some samples, summed over their trained tokens; see `clipped_loss`.

    batch: m samples; part: their rows; prompts and empty: of each row; advantages [m]; weights [m, L], 0 for tokens
    that do not train. The caller divides by the weight of the whole batch.
    """
    new_logits = place_logits(transformer, part, prompts, empty, guidance=guidance, grid=grid)
    token = log_probs(new_logits, part.targets)
    trained = weights[part.sample].gather(1, part.places) * part.revealed
    if likelihood == "exact":
        masked = part.tokens != batch.tokens[part.sample]
        heat = temperatures(batch.steps, start=temperature)[part.sample, part.step]
        rank = batch.rank[part.sample, part.step]
        value, terms = exact_log_prob(token, rank, masked, part.revealed, heat, order=order)
        new, old = (torch.zeros_like(advantages).index_add(0, part.sample, v)
                    for v in (value, batch.exact[part.sample, part.step]))  # fmt: skip
        count = torch.zeros_like(batch.steps).index_add(0, part.sample, terms)
        ratio = log_ratio(new, old, level="exact", terms=count)
    else:
        old = batch.log_probs
        where = (part.sample[:, None] * old.shape[1] + part.places)[part.revealed]
        new = old.flatten().index_put((where,), token[part.revealed]).view_as(old)
        ratio = log_ratio(new, old, level=likelihood, weights=weights)
    loss, stats = clipped_loss(ratio, advantages, weights, clip_range=clip_range)
    if reference is None:
        return loss, stats | {"kl": torch.zeros(())}
    with torch.no_grad():
        reference_logits = place_logits(reference, part, prompts, empty, guidance=guidance, grid=grid)
    away = (divergence(new_logits, reference_logits, part.targets, kind=kl) * trained).sum()
    return loss + kl_weight * away, stats | {"kl": away.detach()}


def train(
    *,
    out: str | Path = "runs/train",
    model: str = "embedded",
    prompts: str | Path | None = None,
    quality: str = "embedded",
    steps: str = "8",
    steps_reward: float = 0.0,
    quality_gate: float | None = None,
    quality_clip: float | None = None,
    reward_weights: Sequence[str] = (),
    iterations: int = 30,
    groups: int = 8,
    group_size: int = 8,
    lr: float = 3e-5,
    guidance: float = 1.0,
    temperature: float | None = None,
    schedule: str | None = None,
    order: str | None = None,
    likelihood: str = "token",
    clip_range: float = 0.2,
    kl: str = "ce",
    kl_weight: float = 0.02,
    percentile: float = 0.0,
    least_quality: float | None = None,
    trained: int | None = None,
    lora: int | None = None,
    merge: bool = False,
    checkpointing: bool = False,
    updates: int = 1,
    micro_batch: int = 16,
    clip_grad: float = 1.0,
    seed: int = 0,
    save_every: int = 10,
    resume: bool = False,
    compile: bool = True,
    device: str = "cpu",
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Trains `model` to need fewer network calls, and saves it to OUT/model in the layout it was loaded from.

    With `lora`, a rank, an adapter is trained in place of the weights and saved to OUT/adapter in peft's layout; OUT is
    then a model as well, and with `merge` OUT/model is saved too.

    Each iteration samples `group_size` pictures of `groups` prompts in `steps` steps ("8", or "2-16": drawn anew for
    each sample), rewards each with its quality (`mixture`) plus steps_reward times `speed_reward`, and makes `updates`
    updates on the clipped loss plus kl_weight times the divergence from the starting model at the revealed tokens.
    `checkpointing` computes each block again in the backward pass, for memory.
    `trained` steps of each rollout, all by default, enter the loss, scaled so that its gradient is that of all in
    expectation. `percentile` and `least_quality` filter groups and samples (`std_percentile`, `low_quality`).
    `temperature`, the mask `schedule` and the reveal `order` None are the model's own.
    `loading` holds further options of `load_generator`, which the saved model keeps.
    OUT/metrics.jsonl gets a line an iteration; with `resume` the newest of OUT/checkpoint.pt goes on exactly. Returns
    the folder of the model or adapter. ValueError and FileNotFoundError for what cannot be used, before anything is
    written.
    """
    settings = dict(locals())
    out, bounds = Path(out), step_range(steps)
    check(settings, bounds)
    generator = load_generator(model, device=device, **(loading or {}))
    length, grid = generator.grid[0] * generator.grid[1], generator.grid
    if bounds[1] > length:
        raise ValueError(f"{bounds[1]} steps are more than the {length} tokens of a picture")
    temperature = generator.temperature if temperature is None else temperature
    schedule, order = schedule or generator.schedule, order or generator.order
    texts = read_prompts(prompts) if prompts else training_prompts(model)
    scores, shares = load_qualities(quality, device=device, weights=reward_weights)
    start(out, settings, resume=resume)

    encoded, empty = encode_prompts(generator, texts), encode_prompts(generator, [generator.negative])
    transformer = generator.transformer
    if lora is not None:
        add_lora(transformer, rank=lora, seed=seed)
    reference = None
    if kl_weight and kl != "none":
        reference = copy.deepcopy(transformer).requires_grad_(False) if lora is None else WithoutLora(transformer)
    transformer.gradient_checkpointing = checkpointing
    if compile:
        transformer.compile_blocks()
        if reference is not None:
            reference.compile_blocks()
    learned = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    moments = dict.fromkeys(scores, Moments())
    first = restore(out, transformer, optimizer, random, moments) if resume else 0
    autocast = bf16_autocast(device)
    size, done, recent = groups * group_size, first, deque(maxlen=TREND)

    with Display(first=first, total=iterations) as display, interruptible() as stopped:
        for iteration in range(first, iterations):
            began = time.time()

            # SAMPLING
            chosen = torch.randperm(len(texts), generator=random)[:groups].repeat_interleave(group_size)
            counts = torch.randint(bounds[0], bounds[1] + 1, (size,), generator=random).to(device)
            noise = draw_noise(size, bounds[1], length, seed=seed, first=iteration * size, device=device)
            prompt = take(encoded, chosen.to(device))
            policy = guided_policy(transformer, prompt, empty, guidance=guidance, grid=grid)
            with autocast:
                batch = rollout(
                    policy, counts, noise, length=length, mask_id=generator.mask_id, temperature=temperature,
                    schedule=schedule, order=order, grid=grid, record=likelihood == "exact",
                )  # fmt: skip

            # REWARDS
            pictures = decode(generator, batch.tokens)
            parts = {name: score(pictures, [texts[i] for i in chosen]).to(device) for name, score in scores.items()}
            moments = {name: observe(moments[name], values) for name, values in parts.items()}
            quality_of = mixture(parts, shares, moments, clip=quality_clip)  # [B]
            speed = speed_reward(counts, max_steps=bounds[1])
            rewards = combine(quality_of, speed, steps_reward=steps_reward, gate=quality_gate)
            advantages = group_advantages(rewards.view(groups, -1)).flatten()
            by_group = quality_of.view(groups, -1)
            keep = std_percentile(by_group, percentile=percentile) * low_quality(by_group, threshold=least_quality)

            # TRAINING
            for _ in range(updates):
                which = trained_steps(counts, trained, random)  # bool [B, S]
                scale = counts / which.sum(-1)  # unbiased where not all steps train
                weights = which.gather(1, batch.reveal_step) * (keep.flatten() * scale)[:, None]  # [B, L]
                kept = weights.sum()
                totals: dict[str, float] = {}
                for index in torch.arange(size, device=device).split(micro_batch):
                    part = Rollout(*(None if field is None else field[index] for field in batch))
                    states = rows(part, which[index], mask_id=generator.mask_id, every_place=likelihood == "exact")
                    with autocast:
                        loss, stats = micro_batch_loss(
                            transformer, reference, part, states, take(prompt, index[states.sample]),
                            repeat(empty, len(states.sample)), advantages[index], weights[index], grid=grid,
                            guidance=guidance, temperature=temperature, order=order, likelihood=likelihood,
                            clip_range=clip_range, kl=kl, kl_weight=kl_weight,
                        )  # fmt: skip
                    normalise(loss, kept).backward()
                    accumulate(totals, stats)
                norm = nn.utils.clip_grad_norm_(learned, clip_grad)
                if torch.isfinite(norm):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            done = iteration + 1
            row = {
                "iteration": done,
                "reward": rewards.mean().item(),
                "quality": quality_of.mean().item(),
                "speed": speed.mean().item(),
                "group_std": by_group.std(-1).mean().item(),
                "kl": totals["kl"] / max(totals["kept"], 1),
                "clip_fraction": totals["clip_fraction"] / max(totals["kept"], 1),
                "ratio_max": totals["ratio_max"],
                "grad_norm": norm.item(),
                "kept": keep.mean().item(),
                "images_per_second": size / (time.time() - began),
            }
            if len(parts) > 1:
                row |= {name: values.mean().item() for name, values in parts.items()}
                recent.append({name: row[name] for name in parts})
                if falling := disagreeing(recent, shares):
                    display.warn(f"the reward rises while {' and '.join(falling)} falls: it may be gamed")
            display.show(row)
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if done % save_every == 0 or done == iterations or stopped():
                save(out, transformer, optimizer, random, moments, done, settings)
            if stopped():
                break
    if done < iterations:
        raise KeyboardInterrupt(f"stopped after iteration {done}; go on with the same command and --resume")
    # from here on the model is sampled as it was trained
    how = {"num_inference_steps": bounds[1], "guidance_scale": guidance, "temperature": temperature,
           "masking_schedule": schedule, "reveal_order": order, "negative_prompt": generator.negative,
           "micro_conds": generator.micro_conds}  # fmt: skip
    if lora is not None:
        beside = {name: value for name, value in (loading or {}).items() if name in ("text_encoder", "size")}
        if "text_encoder" in beside:
            beside["text_encoder"] = lasting(beside["text_encoder"])
        scheduler = generator.scheduler | how | beside
        save_lora(transformer, out / "adapter", base=lasting(model), scheduler=scheduler)
        if not merge:
            return out / "adapter"
        merge_lora(transformer)
    save_generator(generator._replace(scheduler=generator.scheduler | how), out / "model")
    return out / "model"
