"""Policies small enough to enumerate every trajectory of theirs."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrl.method.likelihoods import log_probs, step_log_prob
from speedrl.method.sampler import Sampler
from speedrl.method.sampling import Trajectory, draw_noise, least_likely_positions, plan_steps, rollout
from speedrl.method.schedules import checkerboard, halton_order
from speedrl.method.scoring import positions_of, score, visited_steps


class Toy:
    """A policy over `codes` codes, the mask being the next, whose logits depend on every token and on the timestep.

    It stands in for `speedrl.generation.Policy`: its features are its logits. A sample's logits do not depend on the
    batch around it, not even in the last bit.
    """

    def __init__(self, length: int, codes: int, *, seed: int = 0, weights: Tensor | None = None,
                 grid: tuple[int, int] | None = None):
        shape, random = (length * (codes + 1), length * codes), torch.Generator().manual_seed(seed)
        self.weights = torch.randn(shape, generator=random) if weights is None else weights
        self.length, self.codes, self.mask_id, self.grid = length, codes, codes, grid or (1, length)

    def moved(self, by: float, *, seed: int = 1) -> "Toy":
        """The policy after some updates, with weights that take a gradient."""
        noise = torch.randn(self.weights.shape, generator=torch.Generator().manual_seed(seed))
        return Toy(self.length, self.codes, weights=(self.weights.detach() + by * noise).requires_grad_(),
                   grid=self.grid)

    def features(self, tokens: Tensor, timestep: Tensor, samples: Tensor) -> Tensor:
        known = F.one_hot(tokens, self.codes + 1).flatten(1).to(self.weights)
        logits = (known[:, :, None] * self.weights).sum(1).view(-1, self.length, self.codes)
        return (logits * (1 + timestep[:, None, None] / 8))[None]

    def logits(self, features: Tensor) -> Tensor:
        return features.squeeze(-2)

    def __call__(self, tokens: Tensor, timestep: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        every = self.logits(self.features(tokens, timestep, samples)[0].unsqueeze(-2))
        return every.gather(1, positions[..., None].expand(*positions.shape, self.codes))

    def __getitem__(self, index) -> "Toy":
        return self


def sampled(policy: Toy, steps: list[int], *, seed: int = 0, first: int = 0, scalars=None, step=None, **how):
    """A rollout of a toy, of one sample for each step count; `how` are settings of the sampler."""
    counts = torch.tensor(steps)
    noise = draw_noise(len(steps), max(steps), policy.length, seed=seed, first=first, codes=policy.codes)
    return rollout(policy, counts, noise, Sampler(**how), scalars=scalars, **({} if step is None else {"step": step}))


def every_trajectory(policy: Toy, steps: int, *, order: str = "confidence", scalars=None, **how) -> Trajectory:
    """All trajectories of a toy in so many steps, by brute force: what `rollout` records of each."""
    length, codes = policy.length, policy.codes
    plan = plan_steps(torch.tensor([steps]), Sampler(order=order, **how), length=length, scalars=scalars)
    colours, turns = checkerboard(*policy.grid), halton_order(*policy.grid)
    fields = ("states", "drawn", "kept", "log_probs", "rank")
    found = [(torch.full((length,), codes), torch.zeros(length), {name: [] for name in fields})]
    for s in range(steps):
        grown = []
        for tokens, latest, record in found:
            if plan.remasked[0, s]:
                allowed = (colours == plan.colour[0, s])[None]
                again = least_likely_positions(latest[None], plan.remasked[:, s], allowed)[0]
                tokens = tokens.masked_fill(again, codes)
            masked = tokens == codes
            places = masked.nonzero().flatten().tolist()
            reveals = len(places) - int(plan.masked_after[0, s])
            with torch.no_grad():
                logits = policy.features(tokens[None], plan.timestep[:, s], torch.zeros(1, dtype=torch.int64))[0, 0]
            logits = logits * plan.logit_scale[0, s]
            if order == "halton":  # the positions are always the same
                choices = [sorted(places, key=turns.tolist().__getitem__)[:reveals]]
            elif order == "random":  # an outcome is a set of positions
                choices = itertools.combinations(places, reveals)
            elif reveals == len(places) or not plan.temperature[0, s]:  # the order is no part of the event
                choices = [places[:reveals]] if reveals in (0, len(places)) else None
            else:
                choices = itertools.permutations(places, reveals)
            for chosen in choices:
                # what a fixed or a random order discards plays no part
                at = places if order == "confidence" else sorted(chosen)
                for values in itertools.product(range(codes), repeat=len(at)):
                    drawn = tokens.masked_fill(masked, 0)
                    drawn[at] = torch.tensor(values, dtype=torch.int64)
                    kept, rank = torch.zeros(length, dtype=torch.bool), torch.full((length,), length)
                    kept[list(chosen)] = True
                    rank[list(chosen)] = torch.arange(len(chosen))
                    log_p = log_probs(logits, drawn).masked_fill(~masked, 0)
                    one = dict(states=tokens, drawn=drawn, kept=kept, log_probs=log_p, rank=rank)
                    after = torch.where(kept, drawn, tokens), torch.where(kept, log_p, latest)
                    grown.append((*after, {name: [*record[name], one[name]] for name in fields}))
        found = grown
    recorded = {name: torch.stack([torch.stack(record[name]) for *_, record in found]) for name in fields}
    count = len(found)
    return Trajectory(
        tokens=torch.stack([tokens for tokens, *_ in found]), steps=torch.full((count,), steps), **recorded,
        timestep=plan.timestep.expand(count, -1), temperature=plan.temperature.expand(count, -1),
        logit_scale=plan.logit_scale.expand(count, -1), order=order, mask_id=codes,
    )


def log_likelihood(policy: Toy, trajectory: Trajectory, *, order: str = "confidence") -> Tensor:
    """Exact log-probability of each whole trajectory, with a gradient: [B]."""
    batch, most = trajectory.states.shape[:2]
    total = torch.zeros(batch)
    for s in range(most):
        seen, every = trajectory.states[:, s], torch.arange(batch)
        logits = policy.features(seen, trajectory.timestep[:, s], every)[0] * trajectory.logit_scale[:, s, None, None]
        log_p, masked = log_probs(logits, trajectory.drawn[:, s]), seen == policy.codes
        kept, heat = trajectory.kept[:, s], trajectory.temperature[:, s]
        total = total + step_log_prob(log_p, trajectory.rank[:, s], masked, kept, heat, order=order)[0]
    return total


def every_step(trajectory: Trajectory) -> Tensor:
    """All steps train: bool [B, S]."""
    return visited_steps(trajectory.steps)


def joined(*parts: Trajectory) -> Trajectory:
    """Trajectories of different step counts in one batch, padded as `rollout` pads them."""
    most = max(part.states.shape[1] for part in parts)

    def padded(name: str) -> Tensor:
        found = []
        for part in parts:
            value = getattr(part, name)
            missing = most - value.shape[1]
            if value.ndim == 3 and missing and name in ("states", "drawn"):
                found.append(torch.cat([value, part.tokens[:, None].expand(-1, missing, -1)], 1))
            else:
                shape = (len(value), missing, *value.shape[2:])
                found.append(torch.cat([value, torch.zeros(shape, dtype=value.dtype)], 1))
        return torch.cat(found)

    names = ("states", "drawn", "kept", "log_probs", "rank", "timestep", "temperature", "logit_scale")
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "steps")}
    return Trajectory(**whole, **{name: padded(name) for name in names}, order=parts[0].order, mask_id=parts[0].mask_id)


def scored(policy: Toy, trajectory: Trajectory, *, all_drawn: bool = True):
    """The positions of all steps and the log-probabilities of their tokens."""
    at = positions_of(trajectory, all_drawn=all_drawn)
    return at, score(policy, trajectory, at).log_probs
