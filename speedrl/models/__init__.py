"""Masked image generators: their networks, their files, and how a prompt becomes a picture. They know nothing of RL."""
