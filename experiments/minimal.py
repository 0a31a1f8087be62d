"""GRPO with a learned number of steps on the public API; it leaves out the sampler search, warm-up and moving average.

`python -m experiments.minimal 20` trains the embedded model for 20 iterations, and prints the reward and the mean
number of steps. All else is as `speedrl train` has it: the loss, the filters, the rates.
"""

import copy
import sys

import torch
from torch.optim import AdamW

import speedrl
from speedrl import token_events

G, N, L = 8, 16, 256  # prompts of an iteration, images of each, tokens of an image
PROMPTS = ["a red apple", "a dog on a blue background", "a small rocket", "a big yellow star", "an owl", "a flat cat"]


def main(iterations: int = 2, steps_reward: float = 0.5, quality_gap: float = 0.38) -> None:
    model, quality = speedrl.load_model("embedded"), speedrl.load_quality("embedded")
    sampler, guidance = model.sampler.replace(guidance=1.0, remask=0.5), model.sampler.guidance
    reference = model._replace(transformer=copy.deepcopy(model.transformer).requires_grad_(False))
    choices = speedrl.step_choices("1-16")
    steps = speedrl.StepPolicy(choices, width=model.text_encoder.config.projection_dim)
    optimizer = AdamW([{"params": model.transformer.parameters(), "lr": 1e-4}, *steps.parameter_groups(0.1)])
    for i in range(iterations):
        # ROLLOUT
        prompts = [PROMPTS[(i * G + g) % len(PROMPTS)] for g in range(G) for _ in range(N)]
        policy, before = (speedrl.make_policy(m, prompts, guidance=g) for m, g in ((model, 1.0), (reference, guidance)))
        log_p = steps(policy.prompts.pooled)
        drawn = speedrl.draw_steps(log_p, torch.rand(G * N))
        counts = choices[drawn]
        trajectory = speedrl.rollout(policy, counts, speedrl.draw_noise(G * N, 16, L, seed=i), sampler)
        # REWARD
        scores = quality(speedrl.decode(model, trajectory.tokens), prompts)
        speed = speedrl.speed_reward(counts, max_steps=16)
        rewards = speedrl.combine(scores, speed, steps_reward=steps_reward * quality_gap)
        # ADVANTAGE
        residuals, known = speedrl.count_residuals(scores.view(G, N), counts.view(G, N))
        keep = known * speedrl.std_percentile(residuals, percentile=10, keep=known)
        keep = keep * speedrl.low_quality(residuals, threshold=-2)
        residuals, keep = speedrl.count_residuals(scores.view(G, N), counts.view(G, N), keep=keep)
        advantages = speedrl.group_advantages(residuals, keep=keep).flatten()
        step_advantages = speedrl.leave_one_out(rewards.view(G, N)).flatten() / quality_gap
        # UPDATE
        kept = keep.flatten().float() / keep.float().mean().clamp(min=1e-6)
        trained = speedrl.trained_steps(counts, None, torch.Generator())
        for part in torch.arange(G * N).split(16):
            loss, _ = speedrl.grpo_loss(policy[part], before[part], trajectory[part], advantages[part], kept[part],
                                        trained[part], likelihood=token_events, kl=speedrl.kl, kl_weight=0.2)
            (loss / (G * N * L)).backward()
        (speedrl.step_loss(log_p, drawn, step_advantages) / (G * N)).backward()
        torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{i + 1}: reward {rewards.mean():.3f}, quality {scores.mean():.3f}, steps {counts.float().mean():.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
