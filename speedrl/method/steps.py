"""The step policy: a distribution over step counts that the policy learns, so that a speed reward has a gradient.

A step count that is fixed or drawn independently of the policy gives an additive speed reward no expected gradient.
Here the count of each sample is drawn from a categorical distribution whose logits depend on the prompt, and its score
is that of the distribution that is sampled, the uniform share of exploration included.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPLORATION = 0.1  # share of the uniform distribution, so that every count keeps being sampled


def step_choices(steps: str | int) -> Tensor:
    """The step counts to choose from, int64 [K], rising.

    "8" is 8 alone; "1-16" 1, 16 and the powers of two between them; "1,2,4" these. ValueError for anything else, and
    for counts under 1.
    """
    text = str(steps)
    low, dash, high = text.partition("-")
    try:
        counts = {int(low), int(high)} if dash else {int(part) for part in text.split(",")}
    except ValueError:
        raise ValueError(f"`steps` takes a number, a range or a list, like 8, 1-16 or 2,4,8, not {text!r}") from None
    if min(counts) < 1 or (dash and int(low) > int(high)):
        raise ValueError(f"`steps` must be at least 1, and a range must rise, like 1-16, not {text!r}")
    powers = {2**k for k in range(max(counts).bit_length()) if min(counts) < 2**k < max(counts)} if dash else set()
    return torch.tensor(sorted(counts | powers))


class StepPolicy(nn.Module):
    """Logits over K step counts: a bias, and a linear map of the prompt's pooled text embedding at unit norm.

    Starts at p(N) in proportion to 1/N, so that each count has an equal share of the network evaluations. In float32
    whatever surrounds it.
    """

    choices: Tensor

    def __init__(self, choices: Tensor, width: int):
        super().__init__()
        self.register_buffer("choices", choices)
        self.bias = nn.Parameter(-choices.float().log())
        self.weight = nn.Parameter(torch.zeros(len(choices), width))

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled float [B, D] -> log-probabilities of the counts float32 [B, K], of the distribution sampled."""
        return step_log_probs(self.bias, self.weight, pooled)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The groups for Adam: the bias at `lr`, the weight at lr / sqrt(D).

        An update of Adam moves every parameter by about its rate. At one rate, the embedding would move a logit up to
        sqrt(D) times as far as the bias: the policy would decide on a count before it had compared the others.
        """
        return [{"params": [self.bias], "lr": lr}, {"params": [self.weight], "lr": lr / self.weight.shape[1] ** 0.5}]

    def modes(self, pooled: Tensor) -> Tensor:
        """The most likely count of each prompt: [B, D] -> int64 [B]."""
        return self.choices[self(pooled).argmax(-1)]


def step_log_probs(bias: Tensor, weight: Tensor, pooled: Tensor, *, exploration: float = EXPLORATION) -> Tensor:
    """log((1 - e) softmax(bias + weight u) + e / K), u the pooled embedding at unit norm.

    bias [K], weight [K, D], pooled [B, D] -> float32 [B, K] in nats.
    """
    logits = bias.float() + F.normalize(pooled.float(), dim=-1) @ weight.float().T
    return ((1 - exploration) * logits.softmax(-1) + exploration / logits.shape[-1]).log()


def draw_steps(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Which count each sample takes, by inverting the distribution: [B, K], uniform float [B] -> index int64 [B]."""
    running = log_probs.detach().double().exp().cumsum(-1)
    drawn = (running < (uniform.double() * running[:, -1])[:, None]).sum(-1)
    return drawn.clamp(max=log_probs.shape[-1] - 1)


def step_loss(log_probs: Tensor, drawn: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE on the counts, summed over samples: -sum A log p(count) (Williams, 1992).

    log_probs float32 [B, K], drawn int64 [B] as of `draw_steps`, advantages float32 [B] that do not depend on the
    sample's own count but through its reward -> scalar. Divide by the number of samples of all ranks.
    """
    return -(advantages.detach() * log_probs.gather(1, drawn[:, None]).squeeze(1)).sum()
