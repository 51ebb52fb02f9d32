"""The figures of each step that the report plots: from the trainer's log, or from the recorded completions alone."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..metrics import outcome_correlations, reward_stats, step_metrics


STATE_NAME = "trainer_state.json"
# Names of the log that are worth a curve, in the order of the page
_CURVES = (
    r"rewards/[^/]+/(mean|step_mean)",
    r"kl(/k1|/k3)?",
    r"entropy",
    r"advantages/positive_share",
    r"rewards/.+/steps",
    r"rewards/.+/tokens_per_step",
    r"rewards/.+/corr/.+",
    r"rewards/.+/(unscored|unjudged|withheld|masked)",
    r"completions/(mean_length|clipped_ratio)",
)


def find_state(run_folder: Path) -> Path | None:
    """
    The newest `trainer_state.json` of a run, which holds its log; `None` if nothing was saved.

    Transformers writes one into each checkpoint, and `trainer.save_state()` writes one into the run's folder.
    """
    found = [run_folder / STATE_NAME, *run_folder.glob(f"checkpoint-*/{STATE_NAME}")]
    whole = {path: last_step(path) for path in found if path.is_file()}
    return max(whole, key=lambda path: whole[path], default=None)


def last_step(path: Path) -> int:
    """The step at which a state was saved; -1 if it is not whole."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (ValueError, KeyError, TypeError, OSError):
        return -1


def figures_of_state(path: Path) -> dict[int, dict[str, float]]:
    """What the trainer has logged of training, by step and name."""
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        figures = {name: value for name, value in entry.items() if is_curve(name) and is_number(value)}
        if figures:
            found.setdefault(entry["step"], {}).update(figures)
    return found


def is_curve(name: str) -> bool:
    """Whether a logged figure is plotted."""
    return any(re.fullmatch(pattern, name) for pattern in _CURVES)


def is_number(value: Any) -> bool:
    """Whether it can be plotted."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve_order(name: str) -> tuple[int, str]:
    """Where a curve stands on the page."""
    return next(place for place, pattern in enumerate(_CURVES) if re.fullmatch(pattern, name)), name


def figures_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    The same figures, by the same names, from the completions that were recorded at a step.

    They are of these completions only, so they scatter more than the log does.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Of the step's file.
    """
    names = [source["name"] for source in rows[0]["sources"]]
    has_steps_K = [any(row["sources"][k]["is_steps"] for row in rows) for k in range(len(names))]
    mask_NT = _padded([row["loss_mask"] for row in rows], False).bool()
    rewards_KNT = torch.stack(
        [_padded([_placed(row, row["sources"][k]) for row in rows], math.nan) for k in range(len(names))]
    ).where(mask_NT, math.nan)
    figures: dict[str, float] = {}
    for k, name in enumerate(names):
        totals_N = torch.tensor([sum(_values(row["sources"][k])) for row in rows if _values(row["sources"][k])])
        figures[f"rewards/{name}/mean"] = totals_N.double().mean().item()
        judged_N = [bool(_values(row["sources"][k])) for row in rows]
        figures[f"rewards/{name}/unjudged"] = 1 - sum(judged_N) / len(rows)
        returned = [value for row in rows if row["sources"][k]["is_steps"] for value in row["sources"][k]["returned"]]
        if returned:
            figures[f"rewards/{name}/unscored"] = returned.count(None) / len(returned)
    stats = reward_stats(rewards_KNT, mask_NT)
    figures |= step_metrics(names, stats, has_steps_K)
    if len({row["group"] for row in rows}) * max(row["completion"] + 1 for row in rows) == len(rows):
        group_size = len(rows) // len({row["group"] for row in rows})
        figures |= outcome_correlations(names, stats.scores_KN, has_steps_K, group_size)
    for name in ("kl", "entropy"):
        values = [value for row in rows for _, value in on_loss_tokens(row, name)]
        figures[name] = sum(values) / len(values) if values else math.nan
    advantages = [value for row in rows for _, value in on_loss_tokens(row, "advantages")]
    figures["advantages/positive_share"] = sum(value > 0 for value in advantages) / max(len(advantages), 1)
    figures["completions/mean_length"] = sum(len(row["token_ids"]) for row in rows) / len(rows)
    figures["completions/clipped_ratio"] = sum(row["truncated"] for row in rows) / len(rows)
    return {name: value for name, value in figures.items() if is_curve(name) and is_number(value)}


def on_loss_tokens(row: Mapping[str, Any], column: str) -> list[tuple[int, float]]:
    """A row's loss tokens with their values in a column of the log; none if the column is null."""
    if row[column] is None:
        return []
    values = zip(row[column], row["loss_mask"], strict=True)
    return [(token, value) for token, (value, counts) in enumerate(values) if counts]


def _values(source: Mapping[str, Any]) -> list[float]:
    return [value for value in source["transformed"] if value is not None]


def _placed(row: Mapping[str, Any], source: Mapping[str, Any]) -> list[float]:
    """A source's rewards on their tokens, before any gate."""
    placed = [math.nan] * len(row["token_ids"])
    for end, value in zip(source["ends"], source["transformed"], strict=True):
        if end < len(placed) and value is not None:
            placed[end] = value
    return placed


def _padded(rows: Sequence[Sequence[Any]], padding: Any) -> torch.Tensor:
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.float64)
