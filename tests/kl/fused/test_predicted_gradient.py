"""The gradient of the loss is predicted: one pass through the head where that is possible, right whatever comes."""

import math

import pytest
import torch

from tests.kl.fused.problems import SCALINGS, Projections, dense, fused, gradients, predicting, problem, trained, worst
from trl_grpo_ext.kl.fused.predicted_gradient import SecondPassCount


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_a_predicted_gradient_needs_no_product_in_the_backward(scaling, train_head, factor):
    p = problem(11, 6, 50, ref_width=6, dtype=torch.float64)
    leaves = trained(p) if train_head else [p.hidden.requires_grad_()]
    expected, expected_leaves = dense(p, **scaling)
    with Projections() as forward:
        stats = fused(p, **scaling, predicted_gradient=predicting(p, factor), logits_memory_bytes=4 * 9 * 50 * 8)
    chunks = forward.logits // 2
    assert chunks > 1 and forward.gradients == (2 if train_head else 1) * chunks
    with Projections() as backward:
        found = gradients(stats, p, leaves)
    assert backward.logits == backward.gradients == 0
    for x, y in zip(found, gradients(expected, p, expected_leaves), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("case", ["two tokens", "all tokens", "no kl", "entropy", "nothing predicted"])
def test_tokens_with_another_gradient_than_predicted_are_corrected(train_head, case):
    p = problem(7, 6, 50, ref_width=6, dtype=torch.float64)
    leaves = trained(p) if train_head else [p.hidden.requires_grad_()]
    reference, expected_leaves = dense(p)
    entropy = p.mix[1].clone()
    predicted_gradient = predicting(p, wrong={"two tokens": (1, 5), "all tokens": range(7)}.get(case, ()))
    if case == "nothing predicted":
        predicted_gradient = lambda logp, rows: (torch.zeros_like(logp),) * 2  # noqa: E731
    stats = fused(p, predicted_gradient=predicted_gradient, logits_memory_bytes=3 * 9 * 50 * 8)
    if case == "no kl":
        p.mix[2] = 0
    if case == "entropy":
        p.mix[1, 3:] = entropy[3:]
    with Projections() as backward:
        found = gradients(stats, p, leaves)
    assert backward.logits > 0
    for x, y in zip(found, gradients(reference, p, expected_leaves), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_loss_that_is_not_finite_is_not_hidden_by_the_prediction(bad, everywhere):
    p = problem(7, 6, 50)
    p.hidden.requires_grad_()
    stats = fused(p, predicted_gradient=predicting(p))
    p.mix[2, slice(None) if everywhere else 3] = bad
    (gradient,) = gradients(stats, p, [p.hidden])
    rows = range(7) if everywhere else [3]
    assert not any(gradient[row].isfinite().all() for row in rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_may_be_anything(bad):
    p = problem(7, 6, 50)
    leaves = trained(p)
    reference, expected_leaves = dense(p)
    right = predicting(p)

    def wrong(logp, rows):
        return [g.clone().index_fill_(0, torch.tensor([0]), bad) for g in right(logp, rows)]

    found = gradients(fused(p, predicted_gradient=wrong, logits_memory_bytes=3 * 9 * 50 * 4), p, leaves)
    for x, y in zip(found, gradients(reference, p, expected_leaves), strict=True):
        assert worst(x, y) < 1e-5


@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0])
def test_a_gradient_that_is_small_beside_the_tokens_other_one_is_compared_by_itself(relative):
    p = problem(7, 6, 50)
    # Equal policies: the KL has a large weight and no gradient
    p.ref_hidden = p.hidden.clone()
    p.mix[0] *= 1e-5
    leaves = trained(p)
    stats = fused(p, predicted_gradient=predicting(p))
    p.mix[0] *= 1 + relative
    truth, truth_leaves = dense(p)
    for x, y in zip(gradients(stats, p, leaves), gradients(truth, p, truth_leaves), strict=True):
        assert worst(x, y) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Tokens of the second pass


TOKENS = 11
PREDICTIONS = {
    "right": lambda p: predicting(p),
    "right but for a factor": lambda p: predicting(p, factor=64.0),
    "wrong for three tokens": lambda p: predicting(p, wrong=(0, 4, 10)),
    "right, entropy of four tokens": lambda p: predicting(p),
    "right, entropy of all tokens": lambda p: predicting(p),
    "none": lambda p: None,
    "none, entropy of all tokens": lambda p: None,
}
SECOND_PASS_TOKENS = {
    "right": (0, 0),
    "right but for a factor": (0, 0),
    "wrong for three tokens": (3, 3),
    "right, entropy of four tokens": (4, 4),
    "right, entropy of all tokens": (TOKENS, TOKENS),
    "none": (0, TOKENS),
    "none, entropy of all tokens": (TOKENS, TOKENS),
}


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_second_pass_is_counted(train_head, prediction):
    p = problem(TOKENS, 6, 50, ref_width=6, bias=False)
    leaves = trained(p) if train_head else [p.hidden.requires_grad_()]
    entropy = p.mix[1].clone()
    count = SecondPassCount()
    stats = fused(
        p, predicted_gradient=PREDICTIONS[prediction](p), second_pass=count, logits_memory_bytes=4 * 9 * 50 * 4
    )
    assert count.take() == (0, 0)
    p.mix[1] = entropy if prediction.endswith("entropy of all tokens") else 0
    if prediction.endswith("entropy of four tokens"):
        p.mix[1, 2:6] = entropy[2:6]
    loss = stats.logp @ p.mix[0].float() + stats.kl @ p.mix[2].float()
    if "entropy" in prediction:
        loss = loss + stats.entropy @ p.mix[1].float()
    torch.autograd.grad(loss, [x for x in leaves if x is not None])
    assert count.take() == (SECOND_PASS_TOKENS[prediction][train_head], TOKENS)
    assert count.take() == (0, 0)


def test_the_count_goes_on_until_it_is_taken():
    p = problem(TOKENS, 6, 50)
    leaves = trained(p)
    count = SecondPassCount()
    for wrong in ((), (3,), (5, 6)):
        stats = fused(p, predicted_gradient=predicting(p, wrong=wrong), second_pass=count)
        gradients(stats, p, leaves)
    assert count.take() == (3, 3 * TOKENS)
    with torch.no_grad():
        fused(p, predicted_gradient=predicting(p), second_pass=count)
    assert count.take() == (0, 0)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_in_float16_nothing_is_predicted(train_head):
    p = problem(TOKENS, 6, 50, bias=False)
    leaves = [p.hidden.requires_grad_(), *([p.weight.requires_grad_()] if train_head else [])]
    count = SecondPassCount()
    with torch.autocast("cpu", torch.float16):
        stats = fused(p, predicted_gradient=predicting(p), second_pass=count)
    torch.autograd.grad(stats.logp.sum(), leaves)
    assert count.take() == (TOKENS if train_head else 0, TOKENS)
