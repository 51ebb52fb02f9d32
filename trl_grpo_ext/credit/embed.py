"""
The report's data, compact: one compressed text for each group, which the page opens when the group is looked at.

A group is `header length (4 bytes, little endian), header (JSON), arrays`, compressed with raw deflate, in base64. The
header holds steps and rewards, and numbers of arrays in place of what has a value for each token. An array lies there
byte by byte: first all values' lowest bytes, which compresses better. Tokens are places in a list of all groups'.

What follows from the rest is not there: returns, shares, and advantages as their sums. That they follow is checked
here, with the formulas that the page uses ([`derived`]), and with the roundings of what it gets.
"""

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..advantages.returns import discounted_returns


# Bits of a float32's mantissa that are kept where nothing has to add up: errors are below 0.2 %
_KEPT_BITS = 8
# Difference from what was logged, beyond which a derived number is not used
_SAME = 1e-6


class Vocabulary:
    """The tokens of all groups: each id with each text that it has stood for."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, str], int] = {}

    def place(self, token_id: int, text: str) -> int:
        """Where a token stands in the list."""
        return self._places.setdefault((token_id, text), len(self._places))

    @property
    def tokens(self) -> list[tuple[int, str]]:
        """The list: ids and texts."""
        return list(self._places)


class Arrays:
    """The arrays of a group, each of them once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.index: list[list[int]] = []
        self._known: dict[tuple[bytes, int], int] = {}
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
                Whether an error of 0.2 % does not matter.
        """
        if values is None:
            return None
        numbers = _numbers(values).astype("<f8" if exact else "<f4")
        if rounded:
            # To the nearest number whose last bits are 0; an overflow into the exponent is right, too
            dropped = 23 - _KEPT_BITS
            numbers = ((numbers.view("<u4") + (1 << dropped >> 1)) >> dropped << dropped).view("<f4")
        return self._store(numbers)

    def add_places(self, places: Sequence[int]) -> int:
        """Store places in the vocabulary, as numbers of 4 bytes."""
        return self._store(np.array(places, dtype="<u4"))

    def _store(self, numbers: np.ndarray) -> int:
        size = numbers.itemsize
        data = numbers.view(np.uint8).reshape(-1, size).T.tobytes()
        known = (data, size)
        if known not in self._known:
            self._known[known] = len(self.index)
            self.index.append([self._end, len(numbers), size])
            self.parts.append(data)
            self._end += len(data)
        return self._known[known]


def derived(row: Mapping[str, Any], k: int, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
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
    counted = [other for other in row["sources"] if other["weight"] != 0] if merged else [source]
    mask = np.array(row["loss_mask"], dtype=bool)
    ends = np.any([~np.isnan(_numbers(other["shaped"])[mask]) for other in counted], axis=0)
    earned = np.nan_to_num(_numbers(source["shaped"])[mask])
    mean = _numbers(source["mean"])[mask]
    divisor = _numbers(source["divisor"])[mask]
    if not normalizes_returns:
        earned = np.nan_to_num((earned - mean) / divisor) * ends
    # Where the discount acts, if not everywhere; a turn ends where the loss mask does
    turn_ends = ~np.append(mask[1:], False)[mask]
    unit_ends = {"step": ends, "turn": turn_ends}.get(settings["gamma_unit"])
    ends_1T = None if unit_ends is None else torch.from_numpy(unit_ends)[None]
    returns = discounted_returns(torch.from_numpy(earned)[None], source["gamma"], ends_1T)[0].numpy()
    shares = np.nan_to_num((returns - mean) / divisor) if normalizes_returns else returns
    found = np.full((2, len(mask)), math.nan)
    found[:, mask] = returns, source["weight"] * shares / row["batch_divisor"]
    return found[0], found[1]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Float64, in which `None` is NaN."""
    return np.array(values, dtype=np.float64)


def _same(found: np.ndarray, logged: Sequence[float | None]) -> bool:
    return np.allclose(found, _numbers(logged), rtol=_SAME, atol=_SAME, equal_nan=True)


def _follow(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether all sources' returns and shares, and the advantages as their sums, follow from the rest."""
    if not row["explained"]:
        return False
    total = np.full(len(row["token_ids"]), row["offset"])
    for k, source in enumerate(row["sources"]):
        if source["weight"] == 0:
            continue
        returns, shares = derived(row, k, settings)
        if not (_same(returns, source["return"]) and _same(shares, source["share"])):
            return False
        total += shares
    trained = [value if counts else None for value, counts in zip(row["advantages"], row["loss_mask"], strict=True)]
    return _same(total, trained)


def _in_float32(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with means and divisors as float32 holds them."""

    def rounded(values: Sequence[float | None] | None) -> Any:
        return None if values is None else _numbers(values).astype(np.float32)

    sources = [{**s, "mean": rounded(s["mean"]), "divisor": rounded(s["divisor"])} for s in row["sources"]]
    return {**row, "sources": sources}


def _sparse(values: Sequence[float | None] | None) -> list[list[float]] | None:
    return None if values is None else [[t, value] for t, value in enumerate(values) if value is not None]


def _source(
    source: Mapping[str, Any], settings: Mapping[str, Any], arrays: Arrays, *, exact: bool, follows: bool
) -> dict[str, Any]:
    packed = {name: source[name] for name in ("is_steps", "ends", "returned", "transformed", "withheld")}
    packed["weight"] = source["weight"]
    packed["gamma"] = source["gamma"]
    packed["reward"] = _sparse(source["reward"])
    if source["shaped"] != source["reward"]:
        packed["shaped"] = _sparse(source["shaped"])
    packed |= {name: arrays.add(source[name], exact=exact) for name in ("mean", "divisor")}
    divides = settings["scale_rewards"] != "none" or settings["multi_objective_aggregation"] == "normalize_then_sum"
    if not divides:
        # Else it is the divisor without `advantage_eps`
        packed["std"] = arrays.add(source["std"])
    if not follows or source["weight"] == 0:
        packed |= {name: arrays.add(source[name], exact=True) for name in ("return", "share")}
    return packed


def _row(
    row: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: Vocabulary, arrays: Arrays
) -> dict[str, Any]:
    in_float32 = _follow(_in_float32(row), settings)
    follows = in_float32 or _follow(row, settings)
    places = [vocabulary.place(*token) for token in zip(row["token_ids"], row["tokens"], strict=True)]
    return {
        "completion": row["completion"],
        "tokens": arrays.add_places(places),
        "masked": [t for t, counts in enumerate(row["loss_mask"]) if not counts],
        **{name: row[name] for name in ("truncated", "explained", "offset", "batch_divisor", "step_ends")},
        "advantages": None if follows else arrays.add(row["advantages"]),
        "kl": arrays.add(row["kl"], rounded=True),
        "entropy": arrays.add(row["entropy"], rounded=True),
        "logprobs": arrays.add(row["trainer_logprobs"], rounded=True),
        "ratio": arrays.add(_ratio(row), rounded=True),
        "sources": [_source(s, settings, arrays, exact=not in_float32, follows=follows) for s in row["sources"]],
    }


def _ratio(row: Mapping[str, Any]) -> list[float] | None:
    if row["trainer_logprobs"] is None or row["old_logprobs"] is None:
        return None
    pairs = zip(row["trainer_logprobs"], row["old_logprobs"], strict=True)
    return [math.exp(min(new - old, 50.0)) for new, old in pairs]


def pack_group(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """
    A group as the page reads it.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            The group's rows of the log.
        settings (`Mapping[str, Any]`):
            Of the step's file.
        vocabulary ([`Vocabulary`]):
            Gets the group's tokens.

    Returns:
        `str`: base64.
    """
    arrays = Arrays()
    packed = [_row(row, settings, vocabulary, arrays) for row in rows]
    header = json.dumps({"rows": packed, "arrays": arrays.index}, separators=(",", ":"), allow_nan=False).encode()
    compressor = zlib.compressobj(level=9, wbits=-15)
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
