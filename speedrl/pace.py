"""The pace: how many steps a picture takes, decided by the policy once it sees what it has drawn.

A fixed or drawn step count is independent of the policy, so its speed reward has no expected gradient. Here a picture
is revealed in half of the most steps that it may take. Then a small head on the transformer's features says whether to
stop, or to draw the least sure tokens again in a sweep of two steps (`revise`), after which it decides anew. A sweep
brings much to a picture that went wrong and little to others, and what the network knew of the tokens that it drew last
tells these apart.

In training every picture takes all sweeps, so that what each decision leads to is known, and the objective is the
exact expectation over decisions: the reward at each number of steps times the probability to stop there. Its gradient
is the policy gradient without the noise of drawn decisions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrl.method.remasking import revise_tokens, revised_counts
from speedrl.method.sampling import Rollout

SWEEP = 2  # steps, one for each colour


def divided(most: int) -> tuple[int, int]:
    """Of at most so many steps those that reveal, half, and how many sweeps may follow. ValueError below 3 steps."""
    if most < 3:
        raise ValueError(f"a policy that chooses needs 3 steps at the least, to reveal and revise, got {most}")
    return most // 2, (most - most // 2) // SWEEP


class Pace(nn.Module):
    """Logits of going on after 0, 1, .. sweeps, from `summary` of the features at the step before. Starts at 0: of two
    pictures one goes on."""

    def __init__(self, width: int, most: int):
        super().__init__()
        self.most = most
        self.out = nn.Linear(width, divided(most)[1])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def sweeps(self) -> int:
        """How many sweeps may follow what is revealed."""
        return self.out.out_features

    def forward(self, known: Tensor, *, first: int = 0) -> Tensor:
        """known float32 [B, K, C], what was known at K decisions from the `first` on -> float32 [B, K].

        Of unit length each, so that one learning rate serves any width. In float32 whatever surrounds it.
        """
        with torch.autocast(known.device.type, enabled=False):
            directions = F.layer_norm(known.float(), known.shape[-1:]) / known.shape[-1] ** 0.5
            rows = slice(first, first + known.shape[1])
            return torch.einsum("bkc,kc->bk", directions, self.out.weight[rows].float()) + self.out.bias[rows].float()


def summary(features: Tensor, masked: Tensor) -> Tensor:
    """Features [B, L, C] averaged over the places that are masked, bool [B, L], and drawn now: float32 [B, C]."""
    share = masked / masked.sum(-1, keepdim=True).clamp(min=1)
    return torch.einsum("bl,blc->bc", share, features.float())


def stop_log_probs(logits: Tensor) -> Tensor:
    """Log-probability in nats of stopping after 0 .. K sweeps: logits [B, K] of going on -> float32 [B, K + 1]."""
    went_on = F.pad(F.logsigmoid(logits).cumsum(-1), (1, 0))
    return went_on + F.pad(F.logsigmoid(-logits), (0, 1))


def expected(logits: Tensor, values: Tensor) -> Tensor:
    """What each picture is to expect of the decisions: logits [B, K], values [B, K + 1] at each stop -> float32 [B]."""
    return (stop_log_probs(logits).exp() * values).sum(-1)


class Stops(NamedTuple):
    """Pictures wherever the policy may stop: B samples, K sweeps."""

    tokens: Tensor  # int64 [B, K + 1, L], after each number of sweeps
    known: Tensor  # float32 [B, K, C], the summaries that the decisions are made by
    logits: Tensor  # float32 [B, K], of going on


@torch.no_grad()
def every_stop(
    policy: Callable[..., tuple[Tensor, Tensor]], pace: Pace | None, finished: Rollout, uniform: Tensor, *,
    share: float, **how,
) -> Stops:  # fmt: skip
    """The stops of a finished rollout, with its summary, of samples of as many steps; without a pace its end alone.

    uniform [B, S, L] of all steps; `share` of the tokens that a sweep draws again; `how` as `revise_tokens` takes it.
    """
    if pace is None:
        nothing = finished.log_probs[:, :0]
        return Stops(finished.tokens[:, None], nothing[..., None], nothing)
    found = [finished]
    for sweep in range(pace.sweeps):
        found.append(swept(policy, found[-1], uniform, sweep, share=share, **how))
    known = torch.stack([each.summary for each in found[:-1]], 1)
    return Stops(torch.stack([each.tokens for each in found], 1), known, pace(known))


def swept(policy: Callable[..., tuple[Tensor, Tensor]], finished: Rollout, uniform: Tensor, sweep: int, *,
          share: float, **how) -> Rollout:  # fmt: skip
    """A picture that was revealed and has had `sweep` sweeps, after one more; the rest as of `every_stop`."""
    counts = revised_counts(SWEEP, length=finished.tokens.shape[1], share=share)
    return revise_tokens(policy, finished, uniform[:, finished.countdown.shape[1] + SWEEP * sweep :], counts, **how)


def until_stop(
    policy: Callable[..., tuple[Tensor, Tensor]], pace: Pace, finished: Rollout, uniform: Tensor, *, sweeps: int,
    sharpness: Tensor | None = None, **how,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens int64 [B, L] of pictures that each take sweeps, at most so many, for as long as that is the likelier
    decision, and the steps that they took, int64 [B]. The rest as of `every_stop`."""
    tokens, steps = finished.tokens.clone(), finished.steps.clone()
    running, who = finished, torch.arange(len(tokens), device=tokens.device)

    def of_these(seen: Tensor, timestep: Tensor, samples: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return policy(seen, timestep, who[samples], places)

    for sweep in range(sweeps):
        on = (pace(running.summary[:, None], first=sweep)[:, 0] > 0).nonzero().squeeze(-1)
        if not len(on):
            break
        who, running = who[on], Rollout(*(None if field is None else field[on] for field in running))
        sharp = None if sharpness is None else sharpness[who]
        running = swept(of_these, running, uniform[who], sweep, sharpness=sharp, **how)
        tokens[who], steps[who] = running.tokens, steps[who] + SWEEP
    return tokens, steps
