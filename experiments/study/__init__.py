"""Studies of the method: `python -m experiments.study` compares it with its alternatives, `experiments.study.gradients`
measures the noise of its gradients, `experiments.study.transfer` other prompts and another judge."""
