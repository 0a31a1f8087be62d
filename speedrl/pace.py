"""The pace: how many steps the policy still wants to take, chosen by itself at every state.

A fixed or drawn step count is independent of the policy, so its speed reward has no expected gradient. Here the count
is an action: at each state a small head on the transformer's features gives a distribution over the number of steps
left, one is drawn, and the step reveals what a schedule of that many steps would reveal next; 1 reveals everything.
The log-probability of the draws enters the objective beside that of the tokens.
"""

import torch
from torch import Tensor, nn

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

    def forward(self, features: Tensor, masked: Tensor, planned: Tensor, budget: Tensor) -> Tensor:
        """features [B, L, C], masked bool [B, L], planned and budget int64 [B] -> float32 logits [B, most].

        `planned` is the number of steps left by the last choice, `budget` the most that may still be taken.
        """
        share = masked / masked.sum(-1, keepdim=True).clamp(min=1)
        pooled = (features.float() * share[..., None]).sum(1)
        logits = self.out(self.norm(pooled)).float() + plan_logits(planned, self.out.out_features)
        left = torch.arange(1, self.out.out_features + 1, device=logits.device)
        return logits.masked_fill(left > budget[:, None].clamp(min=1), -torch.inf)


def plan_logits(planned: Tensor, most: int, *, spread: float = 0.5) -> Tensor:
    """The prior, which keeps to the plan: int64 [B] -> float32 [B, most], Gaussian in log2 of the steps left.

    `spread` is its standard deviation in octaves: enough that every state tries a shorter and a longer way.
    """
    left = torch.arange(1, most + 1, device=planned.device)
    octaves = left.float().log2() - planned.clamp(min=1).float().log2()[:, None]
    return -((octaves / spread) ** 2) / 2


def draw_pace(logits: Tensor, uniform: Tensor) -> Tensor:
    """Steps left, by inverting the distribution function: logits [B, most], uniform [B] in [0, 1) -> int64 [B] >= 1."""
    cdf = logits.softmax(-1).cumsum(-1)
    # below the total even where rounding keeps it under 1
    return (cdf <= (uniform * cdf[:, -1])[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1) + 1


def pace_log_prob(logits: Tensor, left: Tensor) -> Tensor:
    """Log-probability in nats of the choice `left` int64 [B], 1 or more: float32 [B]."""
    return logits.log_softmax(-1).gather(-1, left[:, None] - 1)[:, 0]


def advance(
    progress: Tensor, masked: Tensor, left: Tensor, *, length: int, kind: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """One step of `left` more: progress float32 [B] in [0, 1] along the schedule, masked int64 [B] -> both after it.

    Along the schedule a step covers its share of the way that remains, 1 / left, so that N choices of N, N - 1, ..., 1
    follow the schedule of N steps (`masked_counts`). Every step reveals at least one token; the last reveals all.
    """
    after = torch.where(left > 1, progress + (1 - progress) / left, torch.ones_like(progress))
    wanted = (length * mask_ratio(after, kind=kind)).floor().long()
    kept = torch.minimum(wanted, masked - 1).clamp(min=1)
    return after, torch.where((left > 1) & (masked > 1), kept, 0)
