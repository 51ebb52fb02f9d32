"""KL estimators: formulas, and expected gradients by summing over every action."""

import math

import numpy as np
import pytest
import torch

from trl_grpo_ext.kl.divergences import exact_divergence
from trl_grpo_ext.kl.estimates import kl_estimate, weight_by_ratio
from trl_grpo_ext.loss import importance_ratio


POLICY_LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.15, 0.3, 0.05], dtype=torch.float64)
OTHER_SAMPLER = torch.tensor([0.35, 0.05, 0.2, 0.25, 0.15], dtype=torch.float64)


def true_kl_and_gradient(logits, reference):
    """`sum_v p_v log(p_v / q_v)` and its gradient `p_j (log(p_j / q_j) - KL)`, in loops."""
    weights = [math.exp(z) for z in logits.tolist()]
    p = [w / sum(weights) for w in weights]
    log_ratios = [math.log(a / b) for a, b in zip(p, reference.tolist(), strict=True)]
    kl = sum(a * r for a, r in zip(p, log_ratios, strict=True))
    return kl, torch.tensor([a * (r - kl) for a, r in zip(p, log_ratios, strict=True)], dtype=torch.float64)


def expectation_and_gradient(estimator, sampler, use_ratio):
    """Mean and gradient of the per-token term when each action v is sampled with probability `sampler_v`."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logp_V1 = logits.log_softmax(-1)[:, None]  # one completion of one token per action
    old_logp_V1 = (logits.softmax(-1) if sampler is None else sampler).detach().log().reshape(-1, 1)
    values_V1 = kl_estimate(logp_V1, REFERENCE.log()[:, None], estimator)
    if use_ratio:
        ratio = importance_ratio(logp_V1, old_logp_V1, torch.ones_like(logp_V1), "token")
        values_V1 = weight_by_ratio(values_V1, ratio, estimator)
    expected = (old_logp_V1.exp() * values_V1).sum()
    return expected.item(), torch.autograd.grad(expected, logits)[0]


@pytest.mark.parametrize("sampler", [None, OTHER_SAMPLER], ids=["on policy", "off policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_expected_gradient_with_the_ratio_is_that_of_the_exact_divergence(estimator, sampler):
    kl, gradient = true_kl_and_gradient(POLICY_LOGITS, REFERENCE)
    value, actual = expectation_and_gradient(estimator, sampler, use_ratio=True)
    torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-12)
    if estimator != "k2":
        assert value == pytest.approx(kl, rel=1e-10)


def test_the_exact_kl_has_the_same_gradient():
    kl, gradient = true_kl_and_gradient(POLICY_LOGITS, REFERENCE)
    logits = POLICY_LOGITS.clone().requires_grad_()
    actual = exact_divergence(logits, REFERENCE.log())
    assert actual.item() == pytest.approx(kl, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(actual, logits)[0], gradient, rtol=1e-10, atol=1e-12)


def test_without_the_ratio_k1_has_no_gradient_and_k3_that_of_the_other_direction():
    _, gradient = expectation_and_gradient("k1", None, use_ratio=False)
    torch.testing.assert_close(gradient, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-15)
    _, gradient = expectation_and_gradient("k3", None, use_ratio=False)
    torch.testing.assert_close(gradient, POLICY_LOGITS.softmax(-1) - REFERENCE, rtol=1e-10, atol=1e-12)


def test_estimators_equal_their_formulas():
    generator = np.random.default_rng(0)
    logp, ref_logp = generator.normal(size=(2, 3, 4)) - 2
    ref_logp[0, 0] = logp[0, 0] - 1e-7  # k3 is 5e-15 here, near the rounding of exp(-l)
    actual = {k: kl_estimate(torch.tensor(logp), torch.tensor(ref_logp), k) for k in ("k1", "k2", "k3")}
    for i, t in np.ndindex(3, 4):
        log_ratio = logp[i, t] - ref_logp[i, t]
        k3 = log_ratio**2 / 2 if i == t == 0 else math.exp(-log_ratio) + log_ratio - 1
        for name, expected in (("k1", log_ratio), ("k2", log_ratio**2 / 2), ("k3", k3)):
            assert actual[name][i, t].item() == pytest.approx(expected, rel=1e-6 if i == t == 0 else 1e-10, abs=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_ratio_equals_its_formula_and_ignores_what_is_masked(level):
    generator = np.random.default_rng(0)
    logp, old_logp = generator.normal(size=(2, 3, 4)) - 2
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    poisoned = torch.tensor(np.where(mask, logp, np.nan), requires_grad=True)
    ratio = importance_ratio(poisoned, torch.tensor(old_logp), torch.tensor(mask), level)
    assert ratio.shape == ((3, 4) if level == "token" else (3, 1))
    for i in range(3):
        differences = [logp[i, t] - old_logp[i, t] for t in range(4) if mask[i, t]]
        if level == "sequence":
            expected = math.exp(sum(differences) / max(len(differences), 1))
            assert ratio[i, 0].item() == pytest.approx(expected, rel=1e-12)
        else:
            kept = ratio[i][torch.tensor(mask[i]) == 1].tolist()
            assert kept == pytest.approx([math.exp(x) for x in differences], rel=1e-12)
    torch.autograd.backward(ratio[torch.isfinite(ratio)].sum())
    assert poisoned.grad[torch.tensor(mask) == 1].isfinite().all()
    assert (poisoned.grad[torch.tensor(mask) == 1] > 0).all()


def test_k2_keeps_its_own_gradient_and_the_others_that_of_the_ratio():
    for estimator, differentiated in (("k1", True), ("k2", False), ("k3", True)):
        ratio = torch.full((1, 2), 1.5, requires_grad=True)
        value = weight_by_ratio(torch.ones(1, 2), ratio, estimator)
        assert value.tolist() == [[1.5, 1.5]]
        assert value.requires_grad == differentiated


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kl_estimate(x, x[:1], "k3"), r"`ref_logp` must have shape \(2, 3\), got \(1, 3\)"),
        (lambda x: kl_estimate(x, x, "k4"), "estimator must be one of"),
        (lambda x: importance_ratio(x, x, x[:, :1], "token"), r"`mask_BT` must have shape \(2, 3\), got \(2, 1\)"),
        (lambda x: importance_ratio(x, x, x, "word"), "`level` must be"),
        (lambda x: weight_by_ratio(x, x, "k4"), "estimator must be one of"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
