"""Reward models from checkpoints, by presets."""
