"""Reinforcement learning of Mixture-of-Experts language models on off-policy data, with VESPO."""

__version__ = "0.1.0"
