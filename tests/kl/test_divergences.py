"""The table of divergences: each row against loops in float64, and a row from outside through the whole fused head."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kl.fused.problems import dense, fused, gradients, jensen_shannon, kl, predicting, problem, trained, worst
from tests.support import oracles
from trl_grpo_ext.kl.divergences import DIVERGENCES, Distributions, Divergence, exact_divergence


DIRECTIONS = ["reverse", "forward"]


def half_kl_to_mixture(a, b):
    """`a log(2 a / (a + b)) / 2`, of each vocabulary entry."""
    return torch.xlogy(a, 2 * a / (a + b).clamp(min=torch.finfo(a.dtype).tiny)) / 2


# Its two scores are log(2 p / (p + q)) / 2 and log(2 q / (p + q)) / 2
JENSEN_SHANNON = Divergence(
    jensen_shannon,
    lambda d, scratch: (
        half_kl_to_mixture(d.p, d.q).sum(-1, keepdim=True),
        half_kl_to_mixture(d.q, d.p).sum(-1, keepdim=True),
    ),
    lambda d: half_kl_to_mixture(d.p, d.q),
)
ROWS = {**DIVERGENCES, "jensen_shannon": JENSEN_SHANNON}


@pytest.fixture(params=[*DIRECTIONS, "jensen_shannon"])
def direction(request, monkeypatch):
    """The name of a row; one of them is added from outside."""
    monkeypatch.setitem(DIVERGENCES, request.param, ROWS[request.param])
    return request.param


# ---------------------------------------------------------------------------------------------------------------------
# The dense form


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_dense_form_equals_a_loop_in_value_and_gradient(direction):
    generator = np.random.default_rng(0)
    logits = torch.tensor(3 * generator.normal(size=(2, 4, 9)), requires_grad=True)
    ref_logits = torch.tensor(3 * generator.normal(size=(2, 4, 9)))
    actual = exact_divergence(logits, ref_logits, direction)
    (gradient,) = torch.autograd.grad(actual.sum(), logits)
    assert actual.shape == (2, 4)
    for i, t in np.ndindex(2, 4):
        value, expected = oracles.divergence(logits[i, t].tolist(), ref_logits[i, t].tolist(), direction)
        assert actual[i, t].item() == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(gradient[i, t].numpy(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_dense_form_is_computed_in_float32_and_survives_extreme_logits(direction):
    allowed = torch.tensor([[0.5, 0.0, -1e4, -math.inf, -90.0]] * 2)
    other = torch.tensor([[0.0, 0.25, 3.0, 1.0, -1e4], [0.0, 0.25, -math.inf, -math.inf, -1.0]])
    # Each direction is finite where the model that weighs excludes what the other one allows
    logits = (allowed if direction == "reverse" else other).requires_grad_()
    ref_logits = other if direction == "reverse" else allowed
    actual = exact_divergence(logits, ref_logits, direction)
    (gradient,) = torch.autograd.grad(actual.sum(), logits)
    for row in range(2):
        value, expected = oracles.divergence(logits[row].tolist(), ref_logits[row].tolist(), direction)
        assert math.isfinite(value)
        assert actual[row].item() == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(gradient[row].numpy(), expected, rtol=1e-5, atol=1e-7)
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.detach().to(dtype)
        ref_low = ref_logits.detach().to(dtype)
        rounded = exact_divergence(low, ref_low, direction)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact_divergence(low.double(), ref_low.double(), direction).float())


def test_a_divergence_is_infinite_where_one_model_excludes_what_the_other_one_allows():
    policy = torch.tensor([0.5, 0.2, -math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, -0.3, 0.7, -math.inf], dtype=torch.float64)
    assert exact_divergence(policy, reference, "reverse").isfinite()
    assert exact_divergence(reference, policy, "forward").isfinite()
    assert exact_divergence(reference, policy, "reverse") == math.inf
    forward = exact_divergence(policy, reference, "forward")
    assert forward == math.inf
    (gradient,) = torch.autograd.grad(forward, policy)
    torch.testing.assert_close(gradient, policy.softmax(-1) - reference.softmax(-1), rtol=1e-12, atol=1e-15)


def test_an_unknown_direction_and_other_shapes_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"`ref_logits` must have shape \(2, 3\), got \(3,\)"):
        exact_divergence(x, x[0])
    message = "direction must be one of 'reverse', 'forward'; got 'sideways'"
    with pytest.raises(ValueError, match=message):
        exact_divergence(x, x, "sideways")
    with pytest.raises(ValueError, match=message):
        fused(problem(2, 4, 9), direction="sideways")


# ---------------------------------------------------------------------------------------------------------------------
# A row's parts


logit_rows = st.lists(st.floats(-30, 30), min_size=12, max_size=12)


def distributions(logits, ref_logits):
    logp = logits.log_softmax(-1)
    ref_logp = ref_logits.log_softmax(-1)
    return Distributions(logp.exp(), ref_logp.exp(), logp - ref_logp)


@pytest.mark.parametrize("name", ROWS)
@settings(deadline=None, max_examples=60)
@given(logit_rows, logit_rows)
def test_the_scores_make_the_value_and_the_gradient(name, logits, ref_logits):
    """`D = sum p s + sum q r`, `dD/dz = p (s - sum p s)`, and both scores are 0 where p = q."""
    row = ROWS[name]
    logits = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    ref_logits = torch.tensor([ref_logits], dtype=torch.float64)
    value = row.dense(logits.log_softmax(-1), ref_logits.log_softmax(-1))
    (expected,) = torch.autograd.grad(value.sum(), logits)
    with torch.no_grad():
        mean, ref_mean = row.means_(distributions(logits, ref_logits), torch.empty_like(logits))
        assert (mean + ref_mean).item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12)
        d = distributions(logits, ref_logits)
        weighted_score = row.weighted_score_(d)
        torch.testing.assert_close(weighted_score.sum(-1, keepdim=True), mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weighted_score - d.p * mean, expected, rtol=1e-8, atol=1e-12)
        equal = [*row.means_(distributions(logits, logits), torch.empty_like(logits))]
        equal.append(row.weighted_score_(distributions(logits, logits)))
        assert not any(x.any() for x in equal)


@settings(deadline=None, max_examples=60)
@given(logit_rows, logit_rows)
def test_the_forward_kl_is_the_reverse_kl_with_the_models_in_each_others_place(logits, ref_logits):
    logits, ref_logits = torch.tensor([logits, ref_logits]).unsqueeze(1)
    forward = exact_divergence(logits, ref_logits, "forward")
    assert torch.equal(forward, exact_divergence(ref_logits, logits, "reverse"))


# ---------------------------------------------------------------------------------------------------------------------
# Through the fused head


HEADS = ["frozen", "trained"]
LOSSES = ["unpredicted", "predicted", "predicted wrongly", "with entropy"]


@pytest.mark.parametrize("scaling", [{}, {"temperature": 1.4, "logit_scale": 0.6, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("ref_width", [None, 5], ids=["shared head", "own head"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_row_goes_through_the_whole_head(direction, scaling, ref_width, head, loss, dtype):
    p = problem(11, 6, 50, ref_width=ref_width, bias=False, dtype=dtype)
    options = {}
    if loss != "with entropy":
        wrong = (0, 4, 5) if loss == "predicted wrongly" else ()
        predicted_gradient = predicting(p, factor=64.0, wrong=wrong)
        if loss != "unpredicted":
            options["predicted_gradient"] = predicted_gradient
    leaves = trained(p) if head == "trained" else [p.hidden.requires_grad_()]
    expected, expected_leaves = dense(p, **scaling, direction=direction)
    actual = fused(p, **scaling, **options, direction=direction, logits_memory_bytes=3 * 9 * 50 * dtype.itemsize)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.kl.double(), expected.kl, rtol=tolerance, atol=0)
    for x, y in zip(gradients(actual, p, leaves), gradients(expected, p, expected_leaves), strict=False):
        assert worst(x, y) < tolerance


def test_no_row_is_negative_and_equal_policies_are_at_0_exactly(direction):
    p = problem(64, 16, 500, bias=False)
    for size in (0.0, 1e-7, 1e-3):
        p.ref_hidden = p.hidden * (1 + size * torch.linspace(-1, 1, 16))
        values = fused(p, direction=direction).kl
        assert values.min() >= 0
        assert values.any() == (size == 1e-3) or size == 1e-7
        assert values.max() < 1e-4


def test_the_row_from_outside_is_what_its_name_says():
    """The Jensen-Shannon divergence is the mean of the KLs of both models to their mixture, and at most log 2."""
    generator = np.random.default_rng(0)
    logits, ref_logits = 3 * generator.normal(size=(2, 9))
    p, q = (np.exp(z) / np.exp(z).sum() for z in (logits, ref_logits))
    expected = sum(oracles.divergence(np.log(x), np.log((p + q) / 2), "reverse")[0] for x in (p, q)) / 2
    logp, ref_logp = (torch.tensor(z).log_softmax(-1) for z in (logits, ref_logits))
    assert jensen_shannon(logp, ref_logp).item() == pytest.approx(expected, rel=1e-12)
    assert expected < math.log(2)
    assert kl(logp, ref_logp).item() == pytest.approx(oracles.divergence(logits, ref_logits, "reverse")[0], rel=1e-12)


def test_a_row_says_whose_probability_the_log_ratio_is_multiplied_by():
    row = DIVERGENCES["reverse"]
    with pytest.raises(ValueError, match="weight must be one of 'policy', 'reference'; got 'both'"):
        Divergence(row.dense, row.means_, row.weighted_score_, weight="both")


def test_a_row_is_found_by_import_path(monkeypatch):
    x = torch.randn(2, 3, dtype=torch.float64)
    y = torch.randn(2, 3, dtype=torch.float64)
    found = exact_divergence(x, y, f"{__name__}:JENSEN_SHANNON")
    torch.testing.assert_close(found, jensen_shannon(x.log_softmax(-1), y.log_softmax(-1)))
    with pytest.raises(TypeError, match="is a function; it has to be of type Divergence"):
        exact_divergence(x, y, f"{__name__}:jensen_shannon")
