"""The whole method on the public API: GRPO with a learned number of steps, on the embedded model.

`python -m experiments.minimal 20` trains for 20 iterations and prints the reward and the mean number of steps.
"""

import copy
import sys

import torch
from torch.optim import AdamW

import speedrl

G, N, L = 4, 6, 256  # prompts of an iteration, images of each, tokens of an image
PROMPTS = ["a red apple", "a dog on a blue background", "a small rocket", "a big yellow star", "an owl", "a flat cat"]


def main(iterations: int = 2, steps_reward: float = 0.5) -> None:
    model, quality = speedrl.load_model("embedded"), speedrl.load_quality("embedded")
    reference = model._replace(transformer=copy.deepcopy(model.transformer).requires_grad_(False))
    choices, size = speedrl.step_choices(1, 16), dict(grid=model.grid, mask_id=model.mask_id)
    steps = speedrl.StepPolicy(choices, width=model.text_encoder.config.projection_dim)
    optimizer = AdamW([{"params": model.transformer.parameters(), "lr": 1e-4}, *steps.parameter_groups(0.1)])
    for i in range(iterations):
        # ROLLOUT
        prompts = [PROMPTS[(i * G + g) % len(PROMPTS)] for g in range(G) for _ in range(N)]
        policy, before = (speedrl.make_policy(m, prompts, guidance=g) for m, g in ((model, 1.0), (reference, 1.3)))
        log_p = steps(policy.prompts.pooled)
        drawn = speedrl.draw_steps(log_p, torch.rand(G * N))
        counts = choices[drawn]
        trajectory = speedrl.rollout(policy, counts, speedrl.draw_noise(G * N, 16, L, seed=i), **size)
        # REWARD
        scores = quality(speedrl.decode(model, trajectory.tokens), prompts)
        rewards = speedrl.combine(scores, speedrl.speed_reward(counts, max_steps=16), steps_reward=0.5 * steps_reward)
        # ADVANTAGE
        residuals, known = speedrl.count_residuals(scores.view(G, N), counts.view(G, N))
        advantages = speedrl.group_advantages(residuals, keep=known).flatten()
        keep = known * speedrl.std_percentile(residuals, percentile=10, keep=known)
        of_steps = speedrl.leave_one_out(rewards.view(G, N)).flatten()
        # UPDATE
        for part in torch.arange(G * N).split(12):
            some, some_keep = trajectory[part], keep.flatten()[part, None, None]
            new = speedrl.token_log_probs(policy[part], some, mask_id=model.mask_id)
            old = speedrl.token_log_probs(before[part], some, mask_id=model.mask_id).detach()
            loss, _ = speedrl.policy_loss(new - some.log_probs, advantages[part, None, None], some.kept * some_keep)
            away = ((old - new).exp() - 1 + new - old) * some_keep  # k3 at all drawn tokens
            ((loss + 0.005 * away.sum()) / (keep.sum() * L)).backward()
        (speedrl.step_loss(log_p, drawn, of_steps) / (G * N)).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{i + 1}: reward {rewards.mean():.3f}, quality {scores.mean():.3f}, steps {counts.float().mean():.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
