"""Speed-RL: fewer sampling steps for masked image generators, by group-relative policy optimisation."""

__version__ = "0.1.0"
