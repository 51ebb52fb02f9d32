"""Reward sources: what they return, how it is read, and how it reaches the tokens."""
