"""
The log of credit: for a few groups of a logged step, what was trained on, in one parquet file.

A batch is recorded in three moments: when it is scored ([`Recording`] is made), at each micro-batch of the first pass
over it ([`Recording.observe`]), and after the last of these ([`completion_rows`], [`write_rows`]).
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from ..rewards.types import Reward, StepRewards
from ..steps.alignment import align_tokens
from .columns import OBSERVED, schema
from .decomposition import Decomposition


FOLDER = "credit"
# Sums that are shown add up to what was trained on, or are not shown
_TOLERANCE = 1e-5

# Field of a decomposition by the name of its column
_OF_ONE_TOKEN = {"shaped": "rewards_KNT"}
_OF_ALL_TOKENS = {
    "return": "returns_KNT",
    "mean": "mean_KNT",
    "std": "std_KNT",
    "divisor": "divisor_KNT",
    "share": "shares_KNT",
}


class Recording:
    """
    One process's part of a batch that is recorded.

    Args:
        mode (`str`):
            `"train"` or `"eval"`.
        step (`int`):
            The optimizer step.
        rows (`dict[int, dict[str, Any]]`):
            By its row in the batch of all processes, each completion that is recorded, as [`completion_row`] makes it.
        passes_left (`int`):
            Micro-batches until every completion has been in the loss once.
    """

    def __init__(self, mode: str, step: int, rows: dict[int, dict[str, Any]], passes_left: int):
        self.mode = mode
        self.step = step
        self.rows = rows
        self.passes_left = passes_left

    def observe(self, rows_B: torch.Tensor, values: Mapping[str, torch.Tensor | None]) -> bool:
        """
        Keep what the loss has seen of a micro-batch.

        Args:
            rows_B (`torch.Tensor` of shape `(B,)`):
                Rows of the micro-batch in the batch of all processes.
            values (`Mapping[str, torch.Tensor]`):
                By column, `(B, T)` each; `None` where there is none.

        Returns:
            `bool`: whether this was the last micro-batch.
        """
        for place, row in enumerate(rows_B.tolist()):
            if row not in self.rows:
                continue
            recorded = self.rows[row]
            length = len(recorded["token_ids"])
            for column, values_BT in values.items():
                if values_BT is not None:
                    recorded[column] = values_BT[place, :length].detach().float().tolist()
        self.passes_left -= 1
        return self.passes_left == 0


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """
    The text of each token; they join to the completion exactly.

    A character whose bytes lie in several tokens belongs to the last of them.
    """
    text, ends = align_tokens(tokenizer, ids)
    starts = [0, *ends][: len(ends)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def judgement(returned: Reward, transformed: Reward, last_token: int) -> dict[str, Any]:
    """
    What a source has said of a completion, in the log's columns.

    Args:
        returned (`float`, [`StepRewards`] or `None`):
            As the source returned it.
        transformed (`float`, [`StepRewards`] or `None`):
            After its transform.
        last_token (`int`):
            Where a reward of the whole completion stands.
    """
    if isinstance(returned, StepRewards) and isinstance(transformed, StepRewards):
        steps = (list(returned.ends), list(returned.values), list(transformed.values))
    elif returned is None:
        steps = ([], [], [])
    else:
        steps = ([last_token], [returned], [transformed])
    is_steps = isinstance(returned, StepRewards)
    return {"is_steps": is_steps, **dict(zip(("ends", "returned", "transformed"), steps, strict=True))}


def completion_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    loss_mask: Sequence[int],
    advantages: Sequence[float],
    judgements: Sequence[tuple[Reward, Reward]],
) -> dict[str, Any]:
    """
    What a process knows of one of its completions when it is scored.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's tokenizer.
        prompt_ids (`Sequence[int]`):
            The prompt's tokens, without padding.
        token_ids (`Sequence[int]`):
            The completion's T tokens, without padding.
        loss_mask (`Sequence[int]` of length T):
            1 for tokens that are trained on.
        advantages (`Sequence[float]` of length T or 1):
            Of each token, or of all tokens.
        judgements (`Sequence[tuple]` of length K):
            The reward of each source as returned, and after its transform.
    """
    mask = [bool(value) for value in loss_mask]
    # An empty completion has no token for a reward to stand on
    last_token = max((token for token, counts in enumerate(mask) if counts), default=max(len(mask) - 1, 0))
    judged = [judgement(*rewards, last_token) for rewards in judgements]
    ends = {end for source in judged if source["is_steps"] for end in source["ends"]}
    return {
        "prompt": str(tokenizer.decode(list(prompt_ids), clean_up_tokenization_spaces=False)),
        "token_ids": list(token_ids),
        "tokens": token_texts(tokenizer, token_ids),
        "loss_mask": mask,
        "advantages": list(advantages) * (len(mask) if len(advantages) == 1 else 1),
        **dict.fromkeys(OBSERVED),
        "step_ends": sorted(ends),
        "sources": judged,
    }


def completion_rows(
    recorded: Mapping[int, Mapping[str, Any]],
    decomposition: Decomposition,
    counted_KNT: torch.Tensor,
    withheld_NK: torch.Tensor,
    settings: Sequence[Mapping[str, Any]],
    group_size: int,
) -> list[dict[str, Any]]:
    """
    The rows of all processes, with the sums that make their advantages.

    Args:
        recorded (`Mapping[int, Mapping[str, Any]]`):
            What [`completion_row`] made of each completion and the loss has seen, by row of the batch.
        decomposition ([`Decomposition`]):
            Of at least these rows. Under outcome supervision `T = 1`.
        counted_KNT (`torch.Tensor` of shape `(K, N, T)`):
            The rewards that count.
        withheld_NK (`torch.Tensor` of shape `(N, K)`):
            Where a gate withholds them.
        settings (`Sequence[Mapping[str, Any]]` of length K):
            Name, weight, gamma, transform and gate of each source.
        group_size (`int`):
            Completions per prompt.

    Returns:
        `list[dict]`: in the columns of `credit/columns.py`, but for `step`, `mode` and `truncated`.
    """
    fields = {name: values.cpu() for name, values in decomposition._asdict().items() if name.endswith("_KNT")}
    explained = explained_rows(recorded, decomposition)
    counted_KNT = counted_KNT.cpu()
    withheld = withheld_NK.tolist()
    rows = []
    for row, values in sorted(recorded.items()):
        mask = torch.tensor(values["loss_mask"], dtype=torch.bool)
        sources = []
        for k, (judged, described) in enumerate(zip(values["sources"], settings, strict=True)):
            columns: dict[str, Any] = {"reward": _on_last_token(counted_KNT[k, row], mask)}
            # Without the sum, what would lead to it may not be what was computed
            if explained[row] is not False:
                of_one = {name: _on_last_token(fields[field][k, row], mask) for name, field in _OF_ONE_TOKEN.items()}
                of_all = {name: _on_all_tokens(fields[field][k, row], mask) for name, field in _OF_ALL_TOKENS.items()}
                columns |= of_one | of_all
            sources.append({**described, **judged, "withheld": withheld[row][k], **columns})
        is_explained = explained[row] is True
        rows.append(
            {
                **values,
                "group": row // group_size,
                "completion": row % group_size,
                "explained": is_explained,
                "offset": decomposition.offset_N[row].item() if is_explained else None,
                "batch_divisor": decomposition.batch_divisor if is_explained else None,
                "sources": sources,
            }
        )
    return rows


def explained_rows(recorded: Mapping[int, Mapping[str, Any]], decomposition: Decomposition) -> dict[int, bool | None]:
    """
    Whether the sum is the advantage that was trained on, by row; `None` where the sum is not known.

    It is not the advantage where a subclass computes one of its own.
    """
    sums_NT = decomposition.advantages_NT.cpu()
    found: dict[int, bool | None] = {}
    for row, values in recorded.items():
        mask = torch.tensor(values["loss_mask"], dtype=torch.bool)
        sums = _expanded(sums_NT[row], mask)[mask]
        trained = torch.tensor(values["advantages"], dtype=torch.float64)[mask]
        if sums.isnan().any():
            found[row] = None
        else:
            found[row] = bool(((sums - trained).abs() <= _TOLERANCE * trained.abs().clamp(min=1.0)).all())
    return found


def _expanded(values_T: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of a completion's own tokens; those of a completion that counts as one token are all tokens'."""
    return values_T.expand(len(mask)) if len(values_T) == 1 else values_T[: len(mask)]


def _on_all_tokens(values_T: torch.Tensor, mask: torch.Tensor) -> list[float | None]:
    return nullable(_expanded(values_T, mask).where(mask, torch.nan))


def _on_last_token(values_T: torch.Tensor, mask: torch.Tensor) -> list[float | None]:
    """A reward of the whole completion stands on its last loss token."""
    if len(values_T) == 1 and len(mask) > 1:
        is_last = mask & (mask.cumsum(0) == mask.sum())
        return nullable(values_T.expand(len(mask)).where(is_last, torch.nan))
    return _on_all_tokens(values_T, mask)


def nullable(values_T: torch.Tensor) -> list[float | None]:
    """Numbers, with `None` for NaN."""
    return [None if value != value else value for value in values_T.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def credit_file(run_folder: Path, mode: str, step: int) -> Path:
    """The file of a logged step."""
    return run_folder / FOLDER / f"{mode}_{step:08d}.parquet"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """
    Write a step's file, which is there whole or not at all.

    Args:
        path (`Path`):
            From [`credit_file`].
        rows (`Sequence[Mapping[str, Any]]`):
            In the columns of `credit/columns.py`.
        settings (`Mapping[str, Any]`):
            Of the run, for the file's metadata.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema({**settings, "written": time.time()}))
    # Begins with a dot and has no suffix of parquet, so that no reader takes it for a step's file
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    parquet.write_table(table, unfinished, compression="zstd")
    os.replace(unfinished, path)
