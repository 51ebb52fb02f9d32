"""Checkpoints from which a run goes on as if it had not ended."""
