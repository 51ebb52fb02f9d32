"""Each reduction against a loop over its formula, and the cuts of a batch that must not matter."""

import numpy as np
import pytest
import torch

from trl_grpo_ext.loss import LOSS_REDUCTIONS, reduce_tokens


MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
VALUES = np.random.default_rng(0).normal(size=MASK.shape)
SAMPLE_CUT = ("grpo", "sapo", "dr_grpo", "luspo")
TOKEN_CUT = ("cispo", "dapo", "vespo", "token_mean")


def looped(values, mask, reduction, max_completion_length, window_tokens, accumulation_steps):
    """Written from TRL's documentation of `loss_type`."""
    sums, lengths = [], []
    for value_row, mask_row in zip(values, mask, strict=True):
        sums.append(sum(float(v) for v, m in zip(value_row, mask_row, strict=True) if m))
        lengths.append(int(sum(mask_row)))
    if reduction in ("grpo", "sapo"):
        share = sum(s / max(n, 1) for s, n in zip(sums, lengths, strict=True)) / len(sums)
    elif reduction == "bnpo":
        share = sum(sums) / max(sum(lengths), 1)
    elif reduction == "dr_grpo":
        share = sum(sums) / (len(sums) * max_completion_length)
    elif reduction == "luspo":
        share = sum(sums) / len(sums)
    else:
        return sum(sums) / window_tokens
    return share / accumulation_steps


def reduced(values, mask, reduction, max_completion_length=9, window_tokens=8.5, accumulation_steps=1):
    return reduce_tokens(
        torch.as_tensor(values),
        torch.as_tensor(mask),
        reduction,
        max_completion_length=max_completion_length,
        window_tokens=torch.tensor(window_tokens, dtype=torch.float64),
        accumulation_steps=accumulation_steps,
    )


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_equals_its_formula(reduction):
    for mask in (MASK, np.zeros_like(MASK)):
        actual = reduced(VALUES, mask, reduction, 9, 8.5, 3)
        assert actual.shape == ()
        assert actual.item() == pytest.approx(looped(VALUES, mask, reduction, 9, 8.5, 3), rel=1e-12)


def test_covers_the_eight_loss_types_of_trl_and_the_token_mean():
    trl = {"grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"}
    assert set(LOSS_REDUCTIONS) == trl | {"token_mean"} and len(LOSS_REDUCTIONS) == 9


def test_token_mean_is_the_mean_over_all_loss_tokens():
    actual = reduced(VALUES, MASK, "token_mean", window_tokens=float(MASK.sum()))
    assert actual.item() == pytest.approx(VALUES[MASK == 1].mean(), rel=1e-12)


@pytest.mark.parametrize("reduction", SAMPLE_CUT)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_equal_cuts_of_the_completions_do_not_matter(reduction, micro_batch):
    steps = len(VALUES) // micro_batch
    cuts = [slice(i * micro_batch, (i + 1) * micro_batch) for i in range(steps)]
    parts = [reduced(VALUES[cut], MASK[cut], reduction, accumulation_steps=steps).item() for cut in cuts]
    assert sum(parts) == pytest.approx(reduced(VALUES, MASK, reduction).item(), rel=1e-12)


@pytest.mark.parametrize("reduction", TOKEN_CUT)
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1, 1], [2, 4], [5, 1]])
def test_no_cut_matters_to_a_sum_over_the_window(reduction, cuts):
    ends = np.cumsum(cuts)
    parts = [
        reduced(VALUES[end - size : end], MASK[end - size : end], reduction, accumulation_steps=len(cuts)).item()
        for size, end in zip(cuts, ends, strict=True)
    ]
    assert sum(parts) == pytest.approx(reduced(VALUES, MASK, reduction).item(), rel=1e-12)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@pytest.mark.parametrize("poison", [1e4, np.nan, np.inf])
def test_what_is_masked_changes_neither_value_nor_gradient(reduction, poison):
    results = []
    for filler in (0.0, poison):
        values = torch.tensor(np.where(MASK, VALUES, filler), requires_grad=True)
        padded = torch.cat([values, torch.full((len(values), 2), filler, dtype=torch.float64)], dim=1)
        mask = np.pad(MASK, ((0, 0), (0, 2)))
        total = reduced(padded, mask, reduction)
        results.append((total.detach(), torch.autograd.grad(total, values)[0]))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert (results[0][1][torch.tensor(MASK) == 0] == 0).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"must share a shape \(B, T\), got \(6, 5\) and \(6, 4\)"):
        reduced(VALUES, MASK[:, :4], "grpo")
    with pytest.raises(ValueError, match="`reduction` must be one of .*, got 'mean'"):
        reduced(VALUES, MASK, "mean")
