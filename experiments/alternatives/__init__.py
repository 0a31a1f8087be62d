"""What else makes a masked generator fast, as small functions beside the loss of reinforcement learning."""
