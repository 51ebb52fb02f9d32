"""The fused head against the dense computation in float64, written out in `problems` with torch's own log-softmax."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.kl.fused.problems import (
    SCALINGS,
    LiveMemory,
    Projections,
    dense,
    fused,
    gradients,
    predicting,
    problem,
    root_mean_square,
    trained,
    worst,
)
from trl_grpo_ext.kl.divergences import exact_divergence
from trl_grpo_ext.kl.fused.plain import plain_token_stats
from trl_grpo_ext.kl.fused.token_stats import fused_token_stats


DIRECTIONS = ["reverse", "forward"]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("ref_width", [None, 24], ids=["shared head", "own head"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_dense_float64_on_a_large_vocabulary(scaling, ref_width, direction, operations):
    # Neither is a multiple of a kernel's block. The interpreter needs a second for 10,000 entries
    vocabulary = 50_000 if operations == "pytorch" else 5_000
    p = problem(7, 16, vocabulary, ref_width=ref_width, bias=ref_width is not None)
    expected, expected_leaves = dense(p, **scaling, direction=direction)
    # Three tokens a chunk: the last chunk is shorter
    leaves = trained(p)
    actual = fused(p, **scaling, direction=direction, logits_memory_bytes=3 * 6 * vocabulary * 4)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=0)
    for x, y in zip(gradients(actual, p, leaves), gradients(expected, p, expected_leaves), strict=True):
        assert worst(x, y) < 1e-4
    assert not actual.ref_logp.requires_grad


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("ref_width", [None, 2], ids=["shared head", "own head"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(scaling, rows, ref_width, direction):
    p = problem(5, 3, 7, ref_width=ref_width, dtype=torch.float64)
    ref_weight, ref_bias = (p.weight.clone(), p.bias.clone()) if ref_width is None else (p.ref_weight, p.ref_bias)

    def stats(hidden, weight, bias):
        memory = rows * 6 * 7 * 8
        arguments = (hidden, weight, p.targets, p.ref_hidden, ref_weight)
        options = {"bias": bias, "ref_bias": ref_bias, "direction": direction, **scaling}
        return fused_token_stats(*arguments, **options, logits_memory_bytes=memory)[:3]

    assert torch.autograd.gradcheck(stats, trained(p), eps=1e-6, atol=1e-8, rtol=1e-6)
    p.weight.requires_grad_(False), p.bias.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda h: stats(h, p.weight, p.bias), p.hidden, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reduces_to_the_dense_exact_divergence(direction):
    p = problem(4, 8, 30, ref_width=5, dtype=torch.float64)
    logits = p.hidden @ p.weight.T + p.bias
    ref_logits = p.ref_hidden @ p.ref_weight.T + p.ref_bias
    expected = exact_divergence(logits, ref_logits, direction)
    torch.testing.assert_close(fused(p, direction=direction).kl, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("ref_width", [None, 5], ids=["shared head", "own head"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reduces_to_the_plain_version(scaling, ref_width, direction):
    p = problem(9, 8, 30, ref_width=ref_width, dtype=torch.float64)
    options = {"bias": p.bias, "ref_bias": p.ref_bias, "direction": direction, **scaling}
    leaves = trained(p)
    plain = plain_token_stats(p.hidden, p.weight, p.targets, p.ref_hidden, p.ref_weight, **options)
    actual = fused(p, direction=direction, **scaling, logits_memory_bytes=2 * 9 * 30 * 8)
    expected, expected_leaves = dense(p, **scaling, direction=direction)
    expected_gradients = gradients(expected, p, expected_leaves)
    for stats in (plain, actual):
        for x, y in zip(stats, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
        for x, y in zip(gradients(stats, p, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert not stats.ref_logp.requires_grad


def test_the_reverse_kl_is_policy_against_reference_and_the_forward_kl_the_other_way_round():
    # Heads of two tokens: the policy is (0.9, 0.1), the reference (0.5, 0.5)
    one = torch.ones(1, 1)
    flat = torch.zeros(2, 1)
    head = torch.tensor([[math.log(9.0)], [0.0]])
    reverse = fused_token_stats(one, head, torch.tensor([0]), one, flat).kl
    assert reverse.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)
    forward = fused_token_stats(one, head, torch.tensor([0]), one, flat, direction="forward").kl
    assert forward.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)


def test_the_reference_gets_no_gradient_nor_does_a_frozen_head():
    p = problem(4, 3, 11, ref_width=2)
    for x in (p.hidden, p.ref_hidden, p.ref_weight, p.ref_bias):
        x.requires_grad_()
    (hidden_gradient,) = torch.autograd.grad(fused(p).kl.sum(), [p.hidden], retain_graph=False)
    assert hidden_gradient.abs().min() > 0
    assert not any(
        torch.autograd.grad(fused(p).kl.sum(), [x], allow_unused=True)[0] is not None
        for x in (p.ref_hidden, p.ref_weight, p.ref_bias)
    )
    # Under a shared head that is trained, only the policy's side of it counts
    p = problem(4, 3, 11, dtype=torch.float64)
    p.weight.requires_grad_()
    expected, expected_leaves = dense(p)
    expected_gradient = torch.autograd.grad(expected[2].sum(), expected_leaves[1])[0]
    torch.testing.assert_close(torch.autograd.grad(fused(p).kl.sum(), p.weight)[0], expected_gradient)


def test_each_output_alone_has_its_gradient_and_only_the_kl_needs_the_reference_for_it():
    p = problem(5, 4, 13, ref_width=3, dtype=torch.float64)
    leaves = trained(p)
    expected, expected_leaves = dense(p)
    for name, projections in (("logp", 1), ("entropy", 1), ("kl", 2)):
        output = getattr(fused(p), name).sum()
        with Projections() as counted:
            actual_gradients = torch.autograd.grad(output, leaves)
        assert counted.logits == projections
        expected_gradients = torch.autograd.grad(getattr(expected, name).sum(), expected_leaves, retain_graph=True)
        for x, y in zip(actual_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_a_graph_can_be_gone_through_twice():
    p = problem(5, 4, 30)
    for predicted_gradient in (None, predicting(p)):
        leaves = trained(p)
        stats = fused(p, predicted_gradient=predicted_gradient)
        loss = sum((m.float() * x).sum() for m, x in zip(p.mix, stats[:3], strict=True))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        for x, y, z in zip(first, kept, torch.autograd.grad(loss, leaves), strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 inputs", "autocast"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_is_no_worse_than_the_dense_version(autocast, direction, operations):
    tokens = 256 if operations == "pytorch" else 64
    p = problem(tokens, 16, 60, ref_width=12, dtype=torch.float32 if autocast else torch.bfloat16)
    rounded = SimpleNamespace(**vars(p))
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(rounded, name, getattr(p, name).to(torch.bfloat16))
    truth, truth_leaves = dense(rounded, direction=direction)
    naive, naive_leaves = dense(rounded, torch.bfloat16, direction=direction)
    leaves = trained(p)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # A token a chunk: rounding each of the products would show
        ours = fused(p, direction=direction, logits_memory_bytes=6 * 60 * 4)
    assert all(x.dtype == torch.float32 for x in ours)
    for a, b, c in zip(ours, naive, truth, strict=True):
        assert root_mean_square(a, c) <= 1.1 * root_mean_square(b, c)
    results = [gradients(*x) for x in ((ours, p, leaves), (naive, p, naive_leaves), (truth, p, truth_leaves))]
    for (a, b, c), leaf in zip(zip(*results, strict=True), leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert root_mean_square(a, c) <= 1.1 * root_mean_square(b, c)


@pytest.mark.parametrize("head", ["frozen", "trained", "predicted"])
def test_the_gradient_of_tokens_that_are_all_but_certain_is_no_worse_in_bf16(head):
    p = problem(64, 32, 60, bias=False, dtype=torch.bfloat16)
    p.weight = 10 * p.weight
    p.targets = (p.hidden @ p.weight.T).argmax(-1)
    p.mix[1:] = 0
    rounded = SimpleNamespace(**vars(p))
    truth, truth_leaves = dense(rounded)
    assert truth.logp.exp().median() > 0.95
    naive, naive_leaves = dense(rounded, torch.bfloat16)
    leaves = [p.hidden.requires_grad_(), *([p.weight.requires_grad_()] if head == "trained" else [])]
    ours = fused(p, **({"predicted_gradient": predicting(p)} if head == "predicted" else {}))
    results = [gradients(x, p, y)[0] for x, y in ((ours, leaves), (naive, naive_leaves), (truth, truth_leaves))]
    assert root_mean_square(results[0], results[2]) <= 1.2 * root_mean_square(results[1], results[2])


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_small_gradients_survive_fp16_when_the_loss_is_scaled(train_head):
    p = problem(6, 16, 2000, bias=False)
    p.mix[1] = 0
    p.mix *= 3e-5
    expected, expected_leaves = dense(p)
    leaves = [p.hidden.requires_grad_(), *([p.weight.requires_grad_()] if train_head else [])]
    with torch.autocast("cpu", torch.float16):
        stats = fused(p, predicted_gradient=predicting(p))
    p.mix *= 2**16
    found = gradients(stats, p, leaves)
    for x, y in zip(found, gradients(expected, p, expected_leaves), strict=False):
        assert worst(x, y) < 1e-2


def test_in_evaluation_no_gradient_is_prepared():
    p = problem(8, 6, 5000, bias=False)
    trained(p)
    with torch.no_grad(), Projections() as forward:
        fused(p, predicted_gradient=predicting(p))
    assert forward.gradients == 0 and forward.logits > 0


def test_bf16_products_are_summed_over_the_chunks_without_rounding_each(operations):
    p = problem(200 if operations == "pytorch" else 20, 4, 30)
    for name in ("hidden", "weight", "bias", "ref_hidden"):  # whole numbers: the logits are exact in bf16
        setattr(p, name, getattr(p, name).round().clamp(-2, 2))
    leaves = trained(p)
    with torch.autocast("cpu", torch.bfloat16):
        one_chunk = fused(p)
        chunks = fused(p, logits_memory_bytes=6 * 30 * 4)
    for x, y in zip(gradients(chunks, p, leaves), gradients(one_chunk, p, leaves), strict=True):
        assert worst(x, y.double()) < 1e-5


def test_autocast_of_the_forward_holds_in_the_backward():
    p = problem(6, 8, 40)
    leaves = trained(p)
    with torch.autocast("cpu", torch.bfloat16):
        stats = fused(p)
        inside = gradients(stats, p, leaves)
        outside_stats = fused(p)
    rounded = {k: x.bfloat16() for k, x in vars(p).items() if x is not None and x.dtype == torch.float32}
    assert torch.equal(stats.kl, fused(SimpleNamespace(**vars(p) | rounded)).kl)
    for x, y in zip(inside, gradients(outside_stats, p, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    full = fused(p)
    expected = gradients(full, p, leaves)
    full = fused(p)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(gradients(full, p, leaves), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
def test_equals_the_log_probs_entropy_and_reverse_kl_of_trl(scaling):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    p = problem(9, 8, 300, ref_width=6)
    leaves = trained(p)
    temperature = scaling.get("temperature", 1.0)
    softcap = scaling.get("softcap")
    logit_scale = scaling.get("logit_scale", 1.0)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        p.hidden, p.weight, p.bias, p.targets, temperature, 128, softcap, logit_scale, ("entropy",)
    )
    kl, _ = ChunkedDivergenceFunction.apply(
        *leaves, p.ref_hidden, p.ref_weight, p.ref_bias, 1.0, temperature, logit_scale, softcap, logit_scale, softcap
    )
    actual = fused(p, **scaling)
    for x, y in zip(actual, (logp, entropy, kl), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
    for x, y in zip(gradients(actual, p, leaves), gradients((logp, entropy, kl), p, leaves), strict=True):
        assert worst(x, y.double()) < 1e-5


@pytest.mark.parametrize("excluded", [-1e4, -math.inf])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits(excluded, direction):
    p = problem(4, 3, 12, ref_width=3)
    # The policy excludes 4 and 5, the reference 5 and 6, but neither is infinitely far from the other
    p.targets = torch.tensor([0, 3, 7, 9])
    p.bias[4] = excluded if direction == "reverse" else -1e4
    p.bias[5] = excluded
    p.ref_bias[5] = excluded
    p.ref_bias[6] = excluded if direction == "forward" else -1e4
    expected, expected_leaves = dense(p, direction=direction)
    leaves = trained(p)
    actual = fused(p, direction=direction)
    # What one model gives to the token of -1e4 costs about 1e4 times its probability
    assert actual.kl.min() > 10
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=0)
    # The dense gradient of a logit of -inf is NaN in torch only through the excluded entries, whose gradient is 0
    for x, y in zip(gradients(actual, p, leaves), gradients(expected, p, expected_leaves), strict=True):
        assert x.isfinite().all()
        assert worst(x, y) < 1e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_shift_of_all_logits_changes_nothing(direction):
    p = problem(5, 3, 12, ref_width=3)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        setattr(p, name, getattr(p, name).round())  # logits that are whole numbers are shifted without rounding
    results = []
    for shift in (0.0, 1e4):
        p.bias = torch.full((12,), shift)
        p.ref_bias = torch.full((12,), -shift)
        leaves = trained(p)
        stats = fused(p, direction=direction)
        results.append((*stats, *gradients(stats, p, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_reference_that_excludes_what_the_policy_allows_is_infinitely_far():
    p = problem(3, 3, 12, ref_width=3)
    p.ref_bias[6] = -math.inf
    assert fused(p).kl.tolist() == [math.inf] * 3
    assert fused(p, direction="forward").kl.isfinite().all()


@pytest.mark.parametrize("head", ["frozen", "trained", "predicted", "predicted wrongly"])
def test_a_policy_that_excludes_what_the_reference_allows_is_infinitely_far_forward_with_a_finite_gradient(head):
    p = problem(3, 4, 12, ref_width=3, dtype=torch.float64)
    p.targets = torch.tensor([0, 3, 7])
    p.bias[6] = -math.inf
    p.mix[:2] = 0
    options = {}
    if "predicted" in head:
        options["predicted_gradient"] = predicting(p, wrong=(1, 2) if head == "predicted wrongly" else ())
    p.hidden.requires_grad_()
    p.weight.requires_grad_(head == "trained")
    assert fused(p).kl.isfinite().all()
    stats = fused(p, direction="forward", **options)
    assert stats.kl.tolist() == [math.inf] * 3
    leaves = [x for x in (p.hidden, p.weight) if x.requires_grad]
    found = torch.autograd.grad((stats.logp * p.mix[0]).sum() + (stats.kl * p.mix[2]).sum(), leaves)
    with torch.no_grad():
        policy = torch.softmax(p.hidden @ p.weight.T + p.bias, -1)
        reference = torch.softmax(p.ref_hidden @ p.ref_weight.T + p.ref_bias, -1)
        logit_gradient = p.mix[2][:, None] * (policy - reference)
        torch.testing.assert_close(found[0], logit_gradient @ p.weight, rtol=1e-10, atol=1e-12)
        if head == "trained":
            torch.testing.assert_close(found[1], logit_gradient.T @ p.hidden, rtol=1e-10, atol=1e-12)


def test_probabilities_that_underflow_are_not_excluded():
    """The policy's probability of token 6 is exp(-200), 0 in float32; the forward KL pays 200 nats for it, not inf."""
    p = problem(3, 4, 12, ref_width=3)
    p.hidden.requires_grad_()
    p.bias[6] = -200.0
    for bias in (p.bias, None):
        if bias is None:
            # The same without a bias, where nothing can be excluded
            p.weight = torch.cat([p.weight, p.bias[:, None]], 1)
            p.hidden = torch.cat([p.hidden.detach(), torch.ones(3, 1)], 1).requires_grad_()
            p.bias = None
        expected, expected_leaves = dense(p, direction="forward")
        stats = fused(p, direction="forward")
        assert expected.kl.min() > 1
        torch.testing.assert_close(stats.kl.double(), expected.kl, rtol=1e-5, atol=0)
        gradient = torch.autograd.grad(stats.kl.sum(), p.hidden)[0]
        assert worst(gradient, torch.autograd.grad(expected.kl.sum(), expected_leaves[0])[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["frozen", "trained", "predicted"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_policies_have_a_kl_of_exactly_zero(dtype, head, direction):
    p = problem(13, 16, 500, dtype=dtype)
    p.ref_hidden = p.hidden.clone()
    p.hidden.requires_grad_()
    p.weight.requires_grad_(head == "trained")
    options = {"temperature": 0.7, "direction": direction, "logits_memory_bytes": 4 * 6 * 500 * 4}
    if head == "predicted":
        options["predicted_gradient"] = lambda logp, rows: (torch.zeros_like(logp), torch.ones_like(logp))
    for ref_weight, ref_bias in ((None, None), (p.weight.detach().clone(), p.bias.clone())):
        p.ref_weight = ref_weight
        p.ref_bias = ref_bias
        stats = fused(p, **options)
        assert torch.equal(stats.kl, torch.zeros(13))
        assert torch.equal(stats.logp, stats.ref_logp)
        assert torch.equal(torch.autograd.grad(stats.kl.sum(), p.hidden)[0], torch.zeros_like(p.hidden))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_small_kl_is_not_drowned_by_rounding(direction, operations):
    # The reference's hidden states often come from another batch shape: equal up to rounding, and so must the KL be 0
    p = problem(64 if operations == "pytorch" else 16, 16, 5_000, bias=False)
    for size, largest in ((1e-3, 1e-4), (1e-7, 1e-11)):
        p.ref_hidden = p.hidden * (1 + size * torch.linspace(-1, 1, 16))
        kl = fused(p, direction=direction).kl
        expected = dense(p, direction=direction)[0].kl
        assert kl.min() >= 0 and kl.max() < largest
        if size == 1e-3:
            torch.testing.assert_close(kl.double(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_small_kl_still_pulls_the_right_way(direction):
    p = problem(16, 16, 5_000, bias=False)
    p.ref_hidden = p.hidden * (1 + 1e-4 * torch.linspace(-1, 1, 16))
    expected, expected_leaves = dense(p, direction=direction)
    p.hidden.requires_grad_()
    gradient = torch.autograd.grad(fused(p, direction=direction).kl.sum(), p.hidden)[0]
    assert worst(gradient, torch.autograd.grad(expected[2].sum(), expected_leaves[0])[0]) < 1e-2


@pytest.mark.parametrize(("direction", "tolerance"), [("reverse", 1e-4), ("forward", 1e-2)])
@pytest.mark.parametrize("head", ["any loss", "predicted"])
def test_the_gradient_with_respect_to_the_logits_of_a_token_sums_to_zero(direction, tolerance, head):
    p = problem(6, 16, 5_000, bias=False)
    # The gradient with respect to the first hidden state is that sum. Where the KL is small, its own rounding shows
    p.weight[:, 0] = 1
    p.ref_hidden = p.hidden * (1 + 1e-4 * torch.linspace(0, 1, 16))
    p.hidden.requires_grad_()
    options = {}
    if head == "predicted":
        options["predicted_gradient"] = lambda logp, rows: (torch.zeros_like(logp), torch.ones_like(logp))
    gradient = torch.autograd.grad(fused(p, direction=direction, **options).kl.sum(), p.hidden)[0].abs()
    assert gradient[:, 0].max() < tolerance * gradient.max()


@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[2]], ids=["plain", "softcap"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory_is_bounded_by_logits_memory_bytes_whatever_the_number_of_tokens(scaling, direction):
    peaks = []
    for n in (16, 64):
        p = problem(n, 4, 4_000, ref_width=3)
        p.hidden.requires_grad_()
        memory = 4 * 6 * 4_000 * 4  # four tokens a chunk
        with LiveMemory() as live:
            stats = fused(p, **scaling, direction=direction, logits_memory_bytes=memory)
            after_forward = live.now()
            gradients(stats, p, [p.hidden])
        assert after_forward <= 100 * n + 1_000  # some figures per token, nothing V-wide
        per_token = n * 300
        assert memory / 2 < live.peak <= memory + per_token
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] <= 64 * 300


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_results_do_not_depend_on_the_chunks(direction):
    p = problem(11, 8, 50, ref_width=8, dtype=torch.float64)
    leaves = trained(p)
    at_once = fused(p, direction=direction)
    at_once_gradients = gradients(at_once, p, leaves)
    for rows in (1, 3, 10, 11):
        stats = fused(p, direction=direction, logits_memory_bytes=rows * 6 * 50 * 8)
        for x, y in zip((*stats, *gradients(stats, p, leaves)), (*at_once, *at_once_gradients), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_nothing_is_kept_where_no_gradient_is_needed():
    p = problem(6, 4, 2_000, ref_width=3)
    p.ref_hidden.requires_grad_()
    p.ref_weight.requires_grad_()
    assert not any(x.requires_grad for x in fused(p))
    trained(p)
    with torch.no_grad(), LiveMemory() as live:
        stats = fused(p)
        assert live.now() == sum(x.untyped_storage().nbytes() for x in stats)
    assert not any(x.requires_grad for x in stats)


def test_no_token_is_a_differentiable_zero():
    p = problem(0, 4, 9, ref_width=3)
    leaves = trained(p)
    stats = fused(p)
    assert all(x.shape == (0,) and x.dtype == torch.float32 for x in stats)
    for x, leaf in zip(gradients(stats, p, leaves), leaves, strict=True):
        assert torch.equal(x, torch.zeros_like(leaf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 4, 5)}, r"`hidden` .* got shape \(2, 4, 5\)"),
        ({"weight": torch.zeros(9, 5)}, r"`weight` must have shape \(9, 4\), got \(9, 5\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"`targets` must have shape \(2,\), got \(3,\)"),
        ({"ref_hidden": torch.zeros(3, 3)}, r"`ref_hidden` must have shape \(2, 3\), got \(3, 3\)"),
        ({"ref_weight": torch.zeros(8, 3)}, r"`ref_weight` must have shape \(9, 3\), got \(8, 3\)"),
        ({"ref_weight": None, "ref_bias": None}, r"`ref_hidden` must have shape \(2, 4\), got \(2, 3\)"),
        ({"ref_weight": None, "ref_hidden": torch.zeros(2, 4)}, "`ref_bias` needs `ref_weight`"),
        ({"bias": torch.zeros(1, 9)}, r"`bias` must have shape \(9,\), got \(1, 9\)"),
        ({"ref_bias": torch.zeros(8)}, r"`ref_bias` must have shape \(9,\), got \(8,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    p = problem(2, 4, 9, ref_width=3)
    vars(p).update(change)
    with pytest.raises(ValueError, match=message):
        fused(p)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"softcap": -1.0}, {"logits_memory_bytes": 0}])
def test_numbers_that_must_be_positive_are_refused(option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be positive"):
        fused(problem(2, 4, 9), **option)
