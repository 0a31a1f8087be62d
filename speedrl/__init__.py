"""Reinforcement learning that makes masked image generators fast: the public API, imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from speedrl.evaluation.measuring import evaluate as evaluate
    from speedrl.generation import Policy as Policy
    from speedrl.generation import draw as draw
    from speedrl.generation import make_policy as make_policy
    from speedrl.generation import sample as sample
    from speedrl.generation import search_sampler as search_sampler
    from speedrl.method.advantages import count_residuals as count_residuals
    from speedrl.method.advantages import group_advantages as group_advantages
    from speedrl.method.advantages import leave_one_out as leave_one_out
    from speedrl.method.divergences import kl as kl
    from speedrl.method.filters import low_quality as low_quality
    from speedrl.method.filters import std_percentile as std_percentile
    from speedrl.method.hindsight import hide as hide
    from speedrl.method.hindsight import hindsight_weights as hindsight_weights
    from speedrl.method.hindsight import teacher_features as teacher_features
    from speedrl.method.likelihoods import step_log_prob as step_log_prob
    from speedrl.method.losses import policy_loss as policy_loss
    from speedrl.method.ratios import Events as Events
    from speedrl.method.ratios import exact_events as exact_events
    from speedrl.method.ratios import sequence_events as sequence_events
    from speedrl.method.ratios import token_events as token_events
    from speedrl.method.rewards import combine as combine
    from speedrl.method.rewards import speed_reward as speed_reward
    from speedrl.method.sampler import Sampler as Sampler
    from speedrl.method.sampling import Trajectory as Trajectory
    from speedrl.method.sampling import draw_noise as draw_noise
    from speedrl.method.sampling import rollout as rollout
    from speedrl.method.scoring import positions_of as positions_of
    from speedrl.method.scoring import score as score
    from speedrl.method.scoring import token_log_probs as token_log_probs
    from speedrl.method.scoring import token_logits as token_logits
    from speedrl.method.scoring import trained_steps as trained_steps
    from speedrl.method.search import scalars_at as scalars_at
    from speedrl.method.steps import StepPolicy as StepPolicy
    from speedrl.method.steps import draw_steps as draw_steps
    from speedrl.method.steps import step_choices as step_choices
    from speedrl.method.steps import step_loss as step_loss
    from speedrl.models.generator import Generator as Generator
    from speedrl.models.generator import decode as decode
    from speedrl.models.generator import encode_prompts as encode_prompts
    from speedrl.models.loading import load_generator as load_model  # noqa: F401
    from speedrl.models.loading import save_generator as save_model  # noqa: F401
    from speedrl.rewards.loading import load_quality as load_quality
    from speedrl.training import grpo_loss as grpo_loss
    from speedrl.training import train as train

_PLACES = {
    "evaluation.measuring": ("evaluate",),
    "generation": ("Policy", "draw", "make_policy", "sample", "search_sampler"),
    "method.advantages": ("count_residuals", "group_advantages", "leave_one_out"),
    "method.divergences": ("kl",),
    "method.filters": ("low_quality", "std_percentile"),
    "method.hindsight": ("hide", "hindsight_weights", "teacher_features"),
    "method.likelihoods": ("step_log_prob",),
    "method.losses": ("policy_loss",),
    "method.ratios": ("Events", "exact_events", "sequence_events", "token_events"),
    "method.rewards": ("combine", "speed_reward"),
    "method.sampler": ("Sampler",),
    "method.sampling": ("Trajectory", "draw_noise", "rollout"),
    "method.scoring": ("positions_of", "score", "token_log_probs", "token_logits", "trained_steps"),
    "method.search": ("scalars_at",),
    "method.steps": ("StepPolicy", "draw_steps", "step_choices", "step_loss"),
    "models.generator": ("Generator", "decode", "encode_prompts"),
    "models.loading": ("load_model=load_generator", "save_model=save_generator"),
    "rewards.loading": ("load_quality",),
    "training": ("grpo_loss", "train"),
}
_NAMES = {
    name.partition("=")[0]: (module, name.rpartition("=")[2]) for module, names in _PLACES.items() for name in names
}
__all__ = ["__version__", *sorted(_NAMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'speedrl' has no attribute {name!r}")
    module, own = _NAMES[name]
    found = getattr(importlib.import_module(f"speedrl.{module}"), own)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
