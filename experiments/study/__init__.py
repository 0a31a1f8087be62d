"""Studies of the method: `python -m experiments.study` compares it with its alternatives."""
