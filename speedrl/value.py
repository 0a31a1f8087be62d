"""Values of states: what a rollout, halfway, can expect to earn, so that each step has its own credit.

The reward of a finished picture says little of any one of its steps: most of its variance comes from the others. And
where the policy reveals the likeliest of what it draws, token-level log-probabilities have a gradient even on average
over the draws: it sharpens the policy, the more the less sure a state is. Times a whole rollout's advantage, which
goes with the state, it does not cancel: states that go badly, unsure ones, are pushed to be less sure yet. An advantage
that compares with the state's own value is free of both.

The value needs no network of its own: it is the quality of the picture that the policy would most likely finish at the
state, from the logits that it has there anyway, scaled by how much such guesses told of earlier pictures.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speedrl.method.advantages import group_advantages, step_advantages
from speedrl.method.rewards import speed_reward
from speedrl.method.sampling import Rollout
from speedrl.run.distributed import total

FADING = 0.9  # what sums of the iteration before count beside an iteration's own


def guesses(rollout: Rollout, texts: list[str], score: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
    """Quality of the guess at each state, `rollout.guess`: float32 [B, S], 0 at the first and past a sample's end.

    score(tokens int64 [n, L], n texts) -> [n]; texts of B. At the first state all samples of a group have the same
    guess, which tells none from another.
    """
    found = torch.zeros(rollout.guess.shape[:2], device=rollout.tokens.device)
    for step in range(1, found.shape[1]):
        running = (rollout.steps > step).nonzero().squeeze(-1)
        found[running, step] = score(rollout.guess[running, step], [texts[i] for i in running.tolist()]).to(found)
    return found


def above_group(values: Tensor, exists: Tensor, *, group_size: int) -> Tensor:
    """Values [B, S] less their mean over the group's samples that take the step, bool [B, S]; 0 where none is."""
    values, exists = (x.unflatten(0, (-1, group_size)) for x in (values, exists))
    mean = (values * exists).sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    return ((values - mean) * exists).flatten(0, 1)


def features(rollout: Rollout, guessed: Tensor, *, group_size: int) -> Tensor:
    """What the value is linear in: float32 [B, S, 3], the guess above its group's mean times 1, u and u^2, u being the
    share of tokens revealed before the step: the later a guess, the more it tells."""
    step = torch.arange(guessed.shape[1], device=guessed.device)
    share = (rollout.reveal_step[:, None] < step[:, None]).float().mean(-1)
    above = above_group(guessed, step < rollout.steps[:, None], group_size=group_size)
    return above[..., None] * share[..., None] ** torch.arange(3, device=share.device)


def sums(features: Tensor, returns: Tensor) -> Tensor:
    """Sums over states for least squares: features [B, S, 3], returns [B] -> float64 [3, 4], X^T X beside X^T y.

    They add up over ranks, and over iterations to a `fit`; on the CPU, as not every device has float64.
    """
    x = features.cpu().double()
    y = returns.cpu().double()[:, None, None].expand(*x.shape[:2], 1)
    return torch.einsum("bsi,bsj->ij", x, torch.cat([x, y], -1))


def values(features: Tensor, fit: Tensor) -> Tensor:
    """What is to be expected of each state above its group's mean: features [B, S, 3], fit [3, 4] -> float32 [B, S]."""
    slopes = torch.linalg.pinv(fit[:, :3], hermitian=True) @ fit[:, 3]  # 0 where nothing was seen
    return (features.cpu().double() @ slopes).to(features)


def step_credit(
    rollout: Rollout,
    guessed: Tensor,
    rewards: Tensor,
    quality: Tensor,
    fit: Tensor,
    *,
    mine: slice,
    group_size: int,
    gae_lambda: float,
    steps_reward: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Advantages float32 [b, S] of each step of this rank's samples, and the fit with what they showed.

    rollout and guessed [b, S] are the rank's; rewards and quality [B] are of all, `mine` among them the rank's. The
    value of a state is what its guess tells of the quality, and the speed reward of the steps that it plans. Advantages
    are divided by the standard deviation of all rewards within their groups, not by each group's: a group whose
    pictures end alike has steps that differ as much as others'.
    """
    returns, good = (group_advantages(x.view(-1, group_size), scale=False).flatten() for x in (rewards, quality))
    known = features(rollout, guessed, group_size=group_size)
    fit = FADING * fit + total(sums(known, good[mine]))
    step = torch.arange(guessed.shape[1], device=guessed.device)
    speed = speed_reward(step + rollout.countdown + 1, max_steps=max_steps)
    ahead = above_group(steps_reward * speed, step < rollout.steps[:, None], group_size=group_size)
    found = step_advantages(values(known, fit) + ahead, returns[mine], rollout.steps, gae_lambda=gae_lambda)
    return found / (returns.square().mean().sqrt() + 1e-4), fit
