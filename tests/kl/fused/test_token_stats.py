"""The fused head against the dense computation in float64, written out here with torch's own log-softmax."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trl_grpo_ext.kl.divergences import exact_divergence
from trl_grpo_ext.kl.fused.plain import TokenStats
from trl_grpo_ext.kl.fused.token_stats import fused_token_stats, fused_token_stats_for_loss


def root_mean_square(actual, expected):
    return (actual.double() - expected).square().mean().sqrt().item()


SCALINGS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.3},
    {"temperature": 1.4, "logit_scale": 0.6, "softcap": 3.0},
]


def problem(n, width, vocabulary, *, ref_width=None, bias=True, dtype=torch.float32, seed=0):
    """Hidden states, two different heads and targets; the reference is near enough for a KL of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(n, width), normal(vocabulary, width) * 2 / width**0.5
    own_head = ref_width is None
    return SimpleNamespace(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        bias=normal(vocabulary).to(dtype) if bias else None,
        targets=torch.randint(vocabulary, (n,), generator=generator),
        ref_hidden=(hidden + 0.3 * normal(n, width) if own_head else normal(n, ref_width)).to(dtype),
        ref_weight=None if own_head else (normal(vocabulary, ref_width) / ref_width**0.5).to(dtype),
        ref_bias=normal(vocabulary).to(dtype) if bias and not own_head else None,
        mix=normal(3, n),
    )


def fused(p, **options):
    function = fused_token_stats_for_loss if "predicted_gradient" in options else fused_token_stats
    return function(
        p.hidden, p.weight, p.targets, p.ref_hidden, p.ref_weight, bias=p.bias, ref_bias=p.ref_bias, **options
    )


def dense(p, dtype=torch.float64, *, temperature=1.0, logit_scale=1.0, softcap=None):
    """The figures and the leaves they are differentiated by; `dtype` is that of the product, the rest is wider."""

    def log_softmax(hidden, weight, bias):
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        logits = logits.to(torch.promote_types(dtype, torch.float32)) * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits / temperature, -1)

    def constant(x):
        return None if x is None else x.detach().to(dtype)

    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    head = leaves[1:] if p.ref_weight is None else (p.ref_weight, p.ref_bias)
    logp = log_softmax(*leaves)
    ref_logp = log_softmax(constant(p.ref_hidden), *(constant(x) for x in head))
    at_target = torch.arange(len(p.targets)), p.targets
    log_ratio = (logp - ref_logp).masked_fill(logp.exp() == 0, 0)
    entropy = -(logp.exp() * logp.masked_fill(logp.exp() == 0, 0)).sum(-1)
    return TokenStats(logp[at_target], entropy, (logp.exp() * log_ratio).sum(-1), ref_logp[at_target]), leaves


def gradients(stats, p, leaves):
    """Of a random mixture of logp, entropy and kl."""
    loss = sum((m.to(x.dtype) * x).sum() for m, x in zip(p.mix, stats[:3], strict=True))
    leaves = [x for x in leaves if x is not None]
    return torch.autograd.grad(loss, leaves)


def trained(p):
    leaves = [p.hidden, p.weight, p.bias]
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    return leaves


def worst(actual, expected):
    """Largest error, relative to the largest entry."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("ref_width", [None, 24], ids=["shared head", "own head"])
def test_equals_dense_float64_on_a_vocabulary_of_50000(scaling, ref_width):
    p = problem(7, 16, 50_000, ref_width=ref_width, bias=ref_width is not None)
    expected, expected_leaves = dense(p, **scaling)
    # Three tokens a chunk: the last chunk is shorter
    leaves = trained(p)
    actual = fused(p, **scaling, logits_memory_bytes=3 * 6 * 50_000 * 4)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=0)
    for x, y in zip(gradients(actual, p, leaves), gradients(expected, p, expected_leaves), strict=True):
        assert worst(x, y) < 1e-4
    assert not actual.ref_logp.requires_grad


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("ref_width", [None, 2], ids=["shared head", "own head"])
def test_gradcheck(scaling, rows, ref_width):
    p = problem(5, 3, 7, ref_width=ref_width, dtype=torch.float64)
    ref_weight, ref_bias = (p.weight.clone(), p.bias.clone()) if ref_width is None else (p.ref_weight, p.ref_bias)

    def stats(hidden, weight, bias):
        memory = rows * 6 * 7 * 8
        arguments = (hidden, weight, p.targets, p.ref_hidden, ref_weight)
        return fused_token_stats(*arguments, bias=bias, ref_bias=ref_bias, logits_memory_bytes=memory, **scaling)[:3]

    assert torch.autograd.gradcheck(stats, trained(p), eps=1e-6, atol=1e-8, rtol=1e-6)
    p.weight.requires_grad_(False), p.bias.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda h: stats(h, p.weight, p.bias), p.hidden, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_reduces_to_the_dense_exact_kl():
    p = problem(4, 8, 30, ref_width=5, dtype=torch.float64)
    logits, ref_logits = p.hidden @ p.weight.T + p.bias, p.ref_hidden @ p.ref_weight.T + p.ref_bias
    torch.testing.assert_close(fused(p).kl, exact_divergence(logits, ref_logits), rtol=1e-12, atol=0)


def test_the_kl_is_policy_against_reference():
    # Heads of two tokens: the policy is (0.9, 0.1), the reference (0.5, 0.5)
    one, flat = torch.ones(1, 1), torch.zeros(2, 1)
    head = torch.tensor([[math.log(9.0)], [0.0]])
    kl = fused_token_stats(one, head, torch.tensor([0]), one, flat).kl
    assert kl.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)


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


class Projections(TorchDispatchMode):
    """Counts matrix products: those that make logits, and those of the gradients."""

    logits = gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.logits += func is torch.ops.aten.mm.out
        self.gradients += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


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


def expecting(p, factor=1.0, wrong=()):
    """The gradients of [`gradients`]' loss as expected, up to a factor, with some tokens' wrong, and no entropy."""

    def expected(logp, rows):
        g_logp, g_kl = (factor * p.mix[k, rows].to(logp.dtype) for k in (0, 2))
        for token in wrong:
            if rows.start <= token < rows.stop:
                g_logp[token - rows.start] += 0.5
        return g_logp, g_kl

    p.mix[1] = 0
    return expected


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_an_expected_loss_needs_no_product_in_the_backward(scaling, train_head, factor):
    p = problem(11, 6, 50, ref_width=6, dtype=torch.float64)
    leaves = trained(p) if train_head else [p.hidden.requires_grad_()]
    expected, expected_leaves = dense(p, **scaling)
    with Projections() as forward:
        stats = fused(p, **scaling, predicted_gradient=expecting(p, factor), logits_memory_bytes=4 * 9 * 50 * 8)
    chunks = forward.logits // 2
    assert chunks > 1 and forward.gradients == (2 if train_head else 1) * chunks
    with Projections() as backward:
        found = gradients(stats, p, leaves)
    assert backward.logits == backward.gradients == 0
    for x, y in zip(found, gradients(expected, p, expected_leaves), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("case", ["two tokens", "all tokens", "no kl", "entropy", "nothing expected"])
def test_what_was_not_expected_is_made_good(train_head, case):
    p = problem(7, 6, 50, ref_width=6, dtype=torch.float64)
    leaves = trained(p) if train_head else [p.hidden.requires_grad_()]
    reference, expected_leaves = dense(p)
    entropy = p.mix[1].clone()
    expected = expecting(p, wrong={"two tokens": (1, 5), "all tokens": range(7)}.get(case, ()))
    if case == "nothing expected":
        expected = lambda logp, rows: (torch.zeros_like(logp),) * 2  # noqa: E731
    stats = fused(p, predicted_gradient=expected, logits_memory_bytes=3 * 9 * 50 * 8)
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
def test_a_loss_that_is_not_finite_is_not_hidden_by_what_was_expected(bad, everywhere):
    p = problem(7, 6, 50)
    p.hidden.requires_grad_()
    stats = fused(p, predicted_gradient=expecting(p))
    p.mix[2, slice(None) if everywhere else 3] = bad
    (gradient,) = gradients(stats, p, [p.hidden])
    rows = range(7) if everywhere else [3]
    assert not any(gradient[row].isfinite().all() for row in rows)


def test_a_graph_can_be_gone_through_twice():
    p = problem(5, 4, 30)
    for expected in (None, expecting(p)):
        leaves = trained(p)
        loss = sum(
            (m.float() * x).sum() for m, x in zip(p.mix, fused(p, predicted_gradient=expected)[:3], strict=True)
        )
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        for x, y, z in zip(first, kept, torch.autograd.grad(loss, leaves), strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 inputs", "autocast"])
def test_bf16_is_no_worse_than_the_dense_version(autocast):
    p = problem(256, 16, 60, ref_width=12, dtype=torch.float32 if autocast else torch.bfloat16)
    rounded = SimpleNamespace(**vars(p))
    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias"):
        setattr(rounded, name, getattr(p, name).to(torch.bfloat16))
    truth, truth_leaves = dense(rounded)
    naive, naive_leaves = dense(rounded, torch.bfloat16)
    leaves = trained(p)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = fused(
            p, logits_memory_bytes=6 * 60 * 4
        )  # a token a chunk: rounding each of the 256 products would show
    assert all(x.dtype == torch.float32 for x in ours)
    for a, b, c in zip(ours, naive, truth, strict=True):
        assert root_mean_square(a, c) <= 1.1 * root_mean_square(b, c)
    results = [gradients(*x) for x in ((ours, p, leaves), (naive, p, naive_leaves), (truth, p, truth_leaves))]
    for (a, b, c), leaf in zip(zip(*results, strict=True), leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert root_mean_square(a, c) <= 1.1 * root_mean_square(b, c)


@pytest.mark.parametrize("head", ["frozen", "trained", "expected"])
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
    ours = fused(p, **({"predicted_gradient": expecting(p)} if head == "expected" else {}))
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
        stats = fused(p, predicted_gradient=expecting(p))
    p.mix *= 2**16
    found = gradients(stats, p, leaves)
    for x, y in zip(found, gradients(expected, p, expected_leaves), strict=False):
        assert worst(x, y) < 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_expected_may_be_anything(bad):
    p = problem(7, 6, 50)
    leaves, (reference, expected_leaves) = trained(p), dense(p)
    right = expecting(p)

    def expected(logp, rows):
        return [g.clone().index_fill_(0, torch.tensor([0]), bad) for g in right(logp, rows)]

    found = gradients(fused(p, predicted_gradient=expected, logits_memory_bytes=3 * 9 * 50 * 4), p, leaves)
    for x, y in zip(found, gradients(reference, p, expected_leaves), strict=True):
        assert worst(x, y) < 1e-5


@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0])
def test_a_gradient_that_is_small_beside_the_tokens_other_one_is_compared_by_itself(relative):
    p = problem(7, 6, 50)
    # Equal policies: the KL has a large weight and no gradient
    p.ref_hidden = p.hidden.clone()
    p.mix[0] *= 1e-5
    leaves = trained(p)
    stats = fused(p, predicted_gradient=expecting(p))
    p.mix[0] *= 1 + relative
    truth, truth_leaves = dense(p)
    for x, y in zip(gradients(stats, p, leaves), gradients(truth, p, truth_leaves), strict=True):
        assert worst(x, y) < 1e-5


def test_in_evaluation_no_gradient_is_prepared():
    p = problem(8, 6, 5000, bias=False)
    trained(p)
    with torch.no_grad(), Projections() as forward:
        fused(p, predicted_gradient=expecting(p))
    assert forward.gradients == 0 and forward.logits > 0


def test_bf16_products_are_summed_over_the_chunks_without_rounding_each():
    p = problem(200, 4, 30)
    for name in ("hidden", "weight", "bias", "ref_hidden"):  # whole numbers: the logits are exact in bf16
        setattr(p, name, getattr(p, name).round().clamp(-2, 2))
    leaves = trained(p)
    with torch.autocast("cpu", torch.bfloat16):
        one_chunk, chunks = fused(p), fused(p, logits_memory_bytes=6 * 30 * 4)
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
    temperature, softcap = scaling.get("temperature", 1.0), scaling.get("softcap")
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
def test_extreme_logits(excluded):
    p = problem(4, 3, 12, ref_width=3)
    p.targets = torch.tensor([0, 3, 7, 9])  # the policy excludes 4 and 5, the reference 5 and 6
    p.bias[4:6] = excluded
    p.ref_bias[5:7] = -1e4
    if excluded == -math.inf:
        p.ref_bias[5:7] = torch.tensor([-math.inf, -1e4])
    expected, expected_leaves = dense(p)
    leaves = trained(p)
    actual = fused(p)
    assert actual.kl.min() > 10  # what the policy gives to token 6 costs about 1e4 times its probability
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=0)
    # The dense gradient of a logit of -inf is NaN in torch only through the excluded entries, whose gradient is 0
    for x, y in zip(gradients(actual, p, leaves), gradients(expected, p, expected_leaves), strict=True):
        assert x.isfinite().all()
        assert worst(x, y) < 1e-5


def test_a_shift_of_all_logits_changes_nothing():
    p = problem(5, 3, 12, ref_width=3)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        setattr(p, name, getattr(p, name).round())  # logits that are whole numbers are shifted without rounding
    results = []
    for shift in (0.0, 1e4):
        p.bias, p.ref_bias = torch.full((12,), shift), torch.full((12,), -shift)
        leaves = trained(p)
        stats = fused(p)
        results.append((*stats, *gradients(stats, p, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_reference_that_rules_out_what_the_policy_allows_is_infinitely_far():
    p = problem(3, 3, 12, ref_width=3)
    p.ref_bias[6] = -math.inf
    assert fused(p).kl.tolist() == [math.inf] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_policies_have_a_kl_of_exactly_zero(dtype):
    p = problem(13, 16, 500, dtype=dtype)
    p.ref_hidden = p.hidden.clone()
    p.hidden.requires_grad_()
    for ref_weight, ref_bias in ((None, None), (p.weight.clone(), p.bias.clone())):
        p.ref_weight, p.ref_bias = ref_weight, ref_bias
        stats = fused(p, temperature=0.7, logits_memory_bytes=4 * 6 * 500 * 4)
        assert torch.equal(stats.kl, torch.zeros(13))
        assert torch.equal(stats.logp, stats.ref_logp)
        assert torch.equal(torch.autograd.grad(stats.kl.sum(), p.hidden)[0], torch.zeros_like(p.hidden))


def test_a_small_kl_is_not_drowned_by_rounding():
    # The reference's hidden states often come from another batch shape: equal up to rounding, and so must the KL be 0
    p = problem(64, 16, 5_000, bias=False)
    for size, largest in ((1e-3, 1e-4), (1e-7, 1e-11)):
        p.ref_hidden = p.hidden * (1 + size * torch.linspace(-1, 1, 16))
        kl, expected = fused(p).kl, dense(p)[0][2]
        assert kl.min() >= 0 and kl.max() < largest
        if size == 1e-3:
            torch.testing.assert_close(kl.double(), expected, rtol=5e-3, atol=0)


def test_a_small_kl_still_pulls_in_the_right_direction():
    p = problem(16, 16, 5_000, bias=False)
    p.ref_hidden = p.hidden * (1 + 1e-4 * torch.linspace(-1, 1, 16))
    expected, expected_leaves = dense(p)
    p.hidden.requires_grad_()
    gradient = torch.autograd.grad(fused(p).kl.sum(), p.hidden)[0]
    assert worst(gradient, torch.autograd.grad(expected[2].sum(), expected_leaves[0])[0]) < 1e-2


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages made while it is active, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_iter(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in known and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("scaling", [SCALINGS[0], SCALINGS[2]], ids=["plain", "softcap"])
def test_memory_is_bounded_by_logits_memory_whatever_the_number_of_tokens(scaling):
    peaks = []
    for n in (8, 64):
        p = problem(n, 4, 4_000, ref_width=3)
        p.hidden.requires_grad_()
        memory = 4 * 6 * 4_000 * 4  # four tokens a chunk
        with LiveMemory() as live:
            stats = fused(p, **scaling, logits_memory_bytes=memory)
            after_forward = sum(live.sizes.values())
            gradients(stats, p, [p.hidden])
        assert after_forward <= 100 * n + 1_000  # some figures per token, nothing V-wide
        per_token = n * 300
        assert memory / 2 < live.peak <= memory + per_token
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] <= 64 * 300


def test_results_do_not_depend_on_the_chunks():
    p = problem(11, 8, 50, ref_width=8, dtype=torch.float64)
    leaves = trained(p)
    whole = fused(p)
    whole_gradients = gradients(whole, p, leaves)
    for rows in (1, 3, 10, 11):
        stats = fused(p, logits_memory_bytes=rows * 6 * 50 * 8)
        for x, y in zip((*stats, *gradients(stats, p, leaves)), (*whole, *whole_gradients), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_nothing_is_kept_where_no_gradient_is_needed():
    p = problem(6, 4, 2_000, ref_width=3)
    p.ref_hidden.requires_grad_()
    p.ref_weight.requires_grad_()
    assert not any(x.requires_grad for x in fused(p))
    trained(p)
    with torch.no_grad(), LiveMemory() as live:
        stats = fused(p)
        assert sum(live.sizes.values()) == sum(x.untyped_storage().nbytes() for x in stats)
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
