"""Reward models behind HTTP: client, protocols and server."""
