"""
The report's data, compact: one compressed text for each group, which the page opens when the group is looked at.

A group is `header length (4 bytes, little endian), header (JSON), arrays`, compressed with raw deflate, in base64. The
header holds texts, steps and rewards, and numbers of arrays in place of what has a value for each token. An array lies
there byte by byte: first all values' lowest bytes, which compresses better.

Returns and shares are not there if they follow from the rest, which is checked here with the formulas that the page
uses: see [`derived`].
"""

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


# Bits of a float32's mantissa that are kept where nothing has to add up: 4 digits
_KEPT_BITS = 13
# Difference, as a share of the value, beyond which a derived number is not used
_SAME = 1e-9


class Arrays:
    """The arrays of a group, each of them once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.index: list[list[int]] = []
        self._known: dict[bytes, int] = {}
        self._end = 0

    def add(self, values: Sequence[float | None] | None, *, exact: bool = False, rounded: bool = False) -> int | None:
        """
        Store an array, and give its number.

        Args:
            values (`Sequence[float | None]`):
                Its values, of which `None` becomes NaN; `None` for no array.
            exact (`bool`, *optional*, defaults to `False`):
                Whether to keep float64.
            rounded (`bool`, *optional*, defaults to `False`):
                Whether 4 digits do.
        """
        if values is None:
            return None
        numbers = np.array([math.nan if value is None else value for value in values], dtype="<f8" if exact else "<f4")
        if rounded:
            numbers = (numbers.view("<u4") & np.uint32(0xFFFFFFFF << (23 - _KEPT_BITS) & 0xFFFFFFFF)).view("<f4")
        size = numbers.itemsize
        data = numbers.view(np.uint8).reshape(-1, size).T.tobytes()
        if data not in self._known:
            self._known[data] = len(self.index)
            self.index.append([self._end, len(numbers), size])
            self.parts.append(data)
            self._end += len(data)
        return self._known[data]


def derived(row: Mapping[str, Any], k: int, settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    r"""
    Returns and shares of a source, as the page computes them from the rest.

        z_t      = shaped_t, or (shaped_t - mean_t) / divisor_t where step rewards are normalised
        return_t = z_t + g_t return_{t+1}
        share_t  = weight (return_t - mean_t) / divisor_t / batch_divisor, or weight return_t / batch_divisor

    over loss tokens.

    Args:
        row (`Mapping[str, Any]`):
            A row of the log.
        k (`int`):
            The source.
        settings (`Mapping[str, Any]`):
            Of the step's file.

    Returns:
        Returns and shares of all tokens, NaN outside the loss mask.
    """
    source = row["sources"][k]
    normalizes_returns = settings["normalizes"] == "returns"
    merged = settings["multi_objective_aggregation"] == "sum_then_normalize" and not normalizes_returns
    counted = [other["shaped"] for other in row["sources"] if other["weight"] != 0] if merged else [source["shaped"]]
    length = len(row["token_ids"])
    returns = [math.nan] * length
    shares = [math.nan] * length
    following = 0.0
    for t in reversed(range(length)):
        if not row["loss_mask"][t]:
            continue
        earned = source["shaped"][t]
        mean = source["mean"][t]
        divisor = source["divisor"][t]
        if not normalizes_returns:
            is_given = any(shaped[t] is not None for shaped in counted)
            earned = ((earned or 0.0) - mean) / divisor if is_given and divisor is not None else 0.0
        ends = any(shaped[t] is not None for shaped in counted)
        discount = source["gamma"] if settings["gamma_unit"] == "token" or ends else 1.0
        following = (earned or 0.0) + discount * following
        returns[t] = following
        share = following
        if normalizes_returns:
            share = 0.0 if divisor is None else (following - mean) / divisor
        shares[t] = source["weight"] * share / row["batch_divisor"]
    return returns, shares


def _same(found: Sequence[float], logged: Sequence[float | None]) -> bool:
    expected = np.array([math.nan if value is None else value for value in logged])
    return np.allclose(np.array(found), expected, rtol=_SAME, atol=_SAME, equal_nan=True)


def _sparse(values: Sequence[float | None] | None) -> list[list[float]] | None:
    return None if values is None else [[t, value] for t, value in enumerate(values) if value is not None]


def _source(row: Mapping[str, Any], k: int, settings: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    source = row["sources"][k]
    packed = {name: source[name] for name in ("is_steps", "ends", "returned", "transformed", "withheld")}
    packed["weight"] = source["weight"]
    packed["gamma"] = source["gamma"]
    packed["reward"] = _sparse(source["reward"])
    if source["shaped"] != source["reward"]:
        packed["shaped"] = _sparse(source["shaped"])
    packed |= {name: arrays.add(source[name], exact=True) for name in ("mean", "std", "divisor")}
    follows = False
    if row["explained"] and source["weight"] != 0:
        returns, shares = derived(row, k, settings)
        follows = _same(returns, source["return"]) and _same(shares, source["share"])
    if not follows:
        packed |= {name: arrays.add(source[name], exact=True) for name in ("return", "share")}
    return packed


def _row(row: Mapping[str, Any], settings: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    return {
        "completion": row["completion"],
        "text": "".join(row["tokens"]),
        # As JavaScript counts
        "lengths": [len(token.encode("utf-16-le")) // 2 for token in row["tokens"]],
        "ids": row["token_ids"],
        "masked": [t for t, counts in enumerate(row["loss_mask"]) if not counts],
        **{name: row[name] for name in ("truncated", "explained", "offset", "batch_divisor", "step_ends")},
        "advantages": arrays.add(row["advantages"]),
        "kl": arrays.add(row["kl"], rounded=True),
        "entropy": arrays.add(row["entropy"], rounded=True),
        "logprobs": arrays.add(row["trainer_logprobs"], rounded=True),
        "ratio": arrays.add(_ratio(row), rounded=True),
        "sources": [_source(row, k, settings, arrays) for k in range(len(row["sources"]))],
    }


def _ratio(row: Mapping[str, Any]) -> list[float] | None:
    if row["trainer_logprobs"] is None or row["old_logprobs"] is None:
        return None
    pairs = zip(row["trainer_logprobs"], row["old_logprobs"], strict=True)
    return [math.exp(min(new - old, 50.0)) for new, old in pairs]


def pack_group(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """
    A group as the page reads it.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            The group's rows of the log.
        settings (`Mapping[str, Any]`):
            Of the step's file.

    Returns:
        `str`: base64.
    """
    arrays = Arrays()
    packed = [_row(row, settings, arrays) for row in rows]
    header = json.dumps({"rows": packed, "arrays": arrays.index}, separators=(",", ":"), allow_nan=False).encode()
    compressor = zlib.compressobj(level=6, wbits=-15)
    content = len(header).to_bytes(4, "little") + header + b"".join(arrays.parts)
    return base64.b64encode(compressor.compress(content) + compressor.flush()).decode()


def unpack_group(text: str) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What [`pack_group`] has packed, as the page opens it: rows, and arrays by number."""
    content = zlib.decompress(base64.b64decode(text), wbits=-15)
    start = 4 + int.from_bytes(content[:4], "little")
    header = json.loads(content[4:start])
    arrays = []
    for offset, count, size in header["arrays"]:
        planes = np.frombuffer(content, np.uint8, count * size, start + offset).reshape(size, count)
        arrays.append(np.ascontiguousarray(planes.T).view("<f4" if size == 4 else "<f8")[:, 0])
    return header["rows"], arrays
