"""The generated batch in a checkpoint that was saved during the updates on it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import GRPOExtConfig


class SavedBatch(NamedTuple):
    """
    One process's part of a generated batch.

    Args:
        settings (`dict[str, Any]`):
            The settings that shaped the batch; see [`batch_settings`].
        batches (`list[dict[str, Any]]`):
            Its micro-batches.
    """

    settings: dict[str, Any]
    batches: Any


def batch_file(folder: Path, rank: int) -> Path:
    """Where a process keeps its part of the generated batch."""
    return folder / f"batch_{rank}.pt"


def batch_settings(args: GRPOExtConfig, sources: list[str], weights: list[float], processes: int) -> dict[str, Any]:
    """
    The settings that shape a generated batch: its completions, its advantages and its cut into updates.

    Args:
        args ([`GRPOExtConfig`]):
            Settings of the run.
        sources (`list[str]`):
            Names of the reward sources.
        weights (`list[float]`):
            One per reward source.
        processes (`int`):
            Number of processes.

    Returns:
        `dict[str, Any]`: by name.
    """
    cut = {
        "processes": processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
        "num_generations": args.num_generations,
    }
    generation = {
        "prompt_separator": args.prompt_separator,
        "max_completion_length": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "generation_kwargs": repr(args.generation_kwargs),
        "mask_truncated_completions": args.mask_truncated_completions,
    }
    rewards = {
        "reward_funcs": sources,
        "reward_weights": weights,
        "reward_transforms": args.reward_transforms,
        "outcome_gate": args.outcome_gate,
    }
    advantages = {
        "supervision": args.supervision,
        "advantage_estimator": args.advantage_estimator,
        **args.estimator_options,
        "gamma": args.gamma,
        "gamma_unit": args.gamma_unit,
        "advantage_eps": args.advantage_eps,
        "scale_rewards": args.scale_rewards,
        "multi_objective_aggregation": args.multi_objective_aggregation,
    }
    # The batch holds the reference's scores or hidden states
    reference = {"beta": args.beta, "kl_estimator": args.kl_estimator}
    return {**cut, **generation, **rewards, **advantages, **reference}


def save_batch(path: Path, batch: SavedBatch) -> None:
    """Save this process's part of a generated batch."""
    # Processes of other machines may not share a disk with the main one
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(batch._asdict(), path)


def load_batch(path: Path) -> SavedBatch | None:
    """This process's part of the generated batch in a checkpoint, on the CPU; `None` if there is no such file."""
    return SavedBatch(**torch.load(path, map_location="cpu")) if path.is_file() else None


def changed_settings(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two results of [`batch_settings`], one phrase for each setting."""
    return [
        f"{name} was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]
