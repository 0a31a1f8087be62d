"""The pace: how many steps the policy still wants to take, chosen by itself at every state.

A fixed or drawn step count is independent of the policy, so its speed reward has no expected gradient. Here the count
is an action: at each state a small head on the transformer's features gives a distribution over the number of steps
left, one is drawn, and the step reveals what a schedule of that many steps would reveal next; 1 reveals everything.
The log-probability of the draws enters the objective beside that of the tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrl.likelihood import first_past, log_probs
from speedrl.schedule import mask_ratio


class Pace(nn.Module):
    """Logits over 1 .. most steps left, from what the transformer knows of a state. Starts as the prior `plan_logits`.

    The features are averaged over the positions still masked: what is left to decide says how many steps it takes.
    """

    def __init__(self, width: int, most: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, most)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def most(self) -> int:
        """The most steps that it chooses from."""
        return self.out.out_features

    def forward(self, features: Tensor, masked: Tensor, planned: Tensor) -> Tensor:
        """features [B, L, C], masked bool [B, L], planned int64 [B] -> float32 logits [B, most].

        `planned` is the number of steps left by the last choice, which the network was conditioned on. In float32
        whatever surrounds it, so that the choice that is scored is the one that was made.
        """
        with torch.autocast(features.device.type, enabled=False):
            share = masked / masked.sum(-1, keepdim=True).clamp(min=1)
            pooled = torch.einsum("bl,blc->bc", share, features.float())
            logits = F.linear(self.norm(pooled), self.out.weight.float(), self.out.bias.float())
        return logits + plan_logits(planned, self.most)


def plan_logits(planned: Tensor, most: int, *, spread: float = 0.5) -> Tensor:
    """The prior, which keeps to the plan: int64 [B] -> float32 [B, most], Gaussian in log2 of the steps left.

    `spread` is its standard deviation in octaves: enough that every state tries a shorter and a longer way.
    """
    left = torch.arange(1, most + 1, device=planned.device)
    octaves = left.float().log2() - planned.clamp(min=1).float().log2()[:, None]
    return -((octaves / spread) ** 2) / 2


def first_plan(most: int) -> int:
    """The number of steps that a rollout of at most `most` sets out with: halfway from 1 to `most` in octaves.

    From there shorter and longer ways are as near: untrained, of at most 16, it takes 7.0 +- 4.1 steps. From 16 no
    first choice could be longer, and it takes 12.0 +- 2.9. Were it drawn, the count would vary without the policy.
    """
    return round(most**0.5)


def within(logits: Tensor, budget: Tensor | int) -> Tensor:
    """Logits [B, most] without the choices of more steps than may still be taken: `budget` int or int64 [B], from 1."""
    left = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    return logits.masked_fill(left > (budget[:, None] if torch.is_tensor(budget) else budget), -torch.inf)


def draw_pace(logits: Tensor, uniform: Tensor) -> Tensor:
    """Steps left, by inverting the distribution function: logits [B, most], uniform [B] in [0, 1) -> int64 [B] >= 1.

    A choice of probability 0 is never drawn.
    """
    probs = logits.softmax(-1)
    return first_past(probs, uniform * probs.sum(-1))[0] + 1


def pace_log_prob(logits: Tensor, left: Tensor) -> Tensor:
    """Log-probability in nats of the choice `left` int64 [B], 1 or more: float32 [B]."""
    return log_probs(logits, left - 1)


def advance(
    progress: Tensor, masked: Tensor, left: Tensor, *, length: int, kind: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """One step of `left` more: progress float64 [B] in [0, 1] along the schedule, masked int64 [B] -> both after it.

    Along the schedule a step covers its share of the way that remains, 1 / left, so that N choices of N, N - 1, ..., 1
    follow the schedule of N steps (`masked_counts`), to the token as the progress is kept in float64 and rounded as
    there. Every step reveals at least one token; the last reveals all.
    """
    after = torch.where(left > 1, progress + (1 - progress) / left, 1.0)
    wanted = (length * mask_ratio(after.float(), kind=kind)).floor().long()
    kept = torch.minimum(wanted, masked - 1).clamp(min=1)
    return after, torch.where((left > 1) & (masked > 1), kept, 0)


def heat(progress: Tensor, left: Tensor, *, start: float) -> Tensor:
    """Temperature of the confidence noise in a step of `left` more: progress float64 [B], int64 [B] -> float32 [B].

    That of `temperatures` at step s of N where N - s = left are left and s / N = progress lie behind, so it is 0 at
    the last step and `start` at the first, and choices of N, N - 1, ..., 1 have those of N steps.
    """
    # s / (N - 1), of N = left / (1 - progress) steps; the first of one step is its last, and counts as the first
    behind = left * progress / (left - 1 + progress).clamp(min=torch.finfo(progress.dtype).tiny)
    return start * (1 - behind.float())
