"""Reinforcement learning that makes masked image generators fast: the public API, imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from speedrl.evaluation.measuring import evaluate as evaluate
    from speedrl.generation import sample as sample
    from speedrl.method.advantages import count_residuals as count_residuals
    from speedrl.method.advantages import group_advantages as group_advantages
    from speedrl.method.advantages import leave_one_out as leave_one_out
    from speedrl.method.divergences import kl as kl
    from speedrl.method.filters import low_quality as low_quality
    from speedrl.method.filters import std_percentile as std_percentile
    from speedrl.method.likelihoods import step_log_prob as step_log_prob
    from speedrl.method.losses import policy_loss as policy_loss
    from speedrl.method.rewards import combine as combine
    from speedrl.method.rewards import speed_reward as speed_reward
    from speedrl.method.sampling import Trajectory as Trajectory
    from speedrl.method.sampling import draw_noise as draw_noise
    from speedrl.method.sampling import rollout as rollout
    from speedrl.method.search import scalars_at as scalars_at
    from speedrl.method.steps import StepPolicy as StepPolicy
    from speedrl.method.steps import draw_steps as draw_steps
    from speedrl.method.steps import step_choices as step_choices
    from speedrl.method.steps import step_loss as step_loss
    from speedrl.models.generator import decode as decode
    from speedrl.models.generator import encode_prompts as encode_prompts
    from speedrl.models.loading import load_generator as load_model  # noqa: F401
    from speedrl.models.loading import save_generator as save_model  # noqa: F401
    from speedrl.policies import make_policy as make_policy
    from speedrl.policies import token_log_probs as token_log_probs
    from speedrl.rewards.loading import load_quality as load_quality
    from speedrl.stages import search_sampler as search_sampler
    from speedrl.training import train as train

_PLACES = {
    "evaluation.measuring": ("evaluate",),
    "generation": ("sample",),
    "method.advantages": ("count_residuals", "group_advantages", "leave_one_out"),
    "method.divergences": ("kl",),
    "method.filters": ("low_quality", "std_percentile"),
    "method.likelihoods": ("step_log_prob",),
    "method.losses": ("policy_loss",),
    "method.rewards": ("combine", "speed_reward"),
    "method.sampling": ("Trajectory", "draw_noise", "rollout"),
    "method.search": ("scalars_at",),
    "method.steps": ("StepPolicy", "draw_steps", "step_choices", "step_loss"),
    "models.generator": ("decode", "encode_prompts"),
    "models.loading": ("load_model=load_generator", "save_model=save_generator"),
    "policies": ("make_policy", "token_log_probs"),
    "rewards.loading": ("load_quality",),
    "stages": ("search_sampler",),
    "training": ("train",),
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
