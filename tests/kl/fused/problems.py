"""A problem for the fused head, its dense computation in float64, and what the head's tests count and measure."""

import gc
import math
import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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

    hidden = normal(n, width)
    weight = normal(vocabulary, width) * 2 / width**0.5
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
    for_loss = {"predicted_gradient", "second_pass"} & options.keys()
    function = fused_token_stats_for_loss if for_loss else fused_token_stats
    return function(
        p.hidden, p.weight, p.targets, p.ref_hidden, p.ref_weight, bias=p.bias, ref_bias=p.ref_bias, **options
    )


def kl(logp, ref_logp):
    """`sum_v p_v log(p_v / q_v)`, with `0 log 0 = 0`."""
    p = logp.exp()
    return (p * (logp - ref_logp).masked_fill(p == 0, 0)).sum(-1)


def jensen_shannon(logp, ref_logp):
    """The mean of the KLs of both to their mixture."""
    mixture = torch.logaddexp(logp, ref_logp) - math.log(2)
    return (kl(logp, mixture) + kl(ref_logp, mixture)) / 2


DENSE = {"reverse": kl, "forward": lambda logp, ref_logp: kl(ref_logp, logp), "jensen_shannon": jensen_shannon}


def dense(p, dtype=torch.float64, *, temperature=1.0, logit_scale=1.0, softcap=None, direction="reverse"):
    """The statistics and the leaves they are differentiated by; `dtype` is that of the product, the rest is wider."""

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
    at_target = (torch.arange(len(p.targets)), p.targets)
    entropy = -(logp.exp() * logp.masked_fill(logp.exp() == 0, 0)).sum(-1)
    return TokenStats(logp[at_target], entropy, DENSE[direction](logp, ref_logp), ref_logp[at_target]), leaves


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


class Projections(TorchDispatchMode):
    """Counts matrix products: those that make logits, and those of the gradients."""

    logits = gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.logits += func is torch.ops.aten.mm.out
        self.gradients += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


def predicting(p, factor=1.0, wrong=()):
    """Predict the gradients of [`gradients`]' loss up to a factor, some tokens' wrong; take the entropy out of it."""

    def predicted_gradient(logp, rows):
        g_logp, g_kl = (factor * p.mix[k, rows].to(logp.dtype) for k in (0, 2))
        for token in wrong:
            if rows.start <= token < rows.stop:
                g_logp[token - rows.start] += 0.5
        return g_logp, g_kl

    p.mix[1] = 0
    return predicted_gradient


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages made while it is active, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def now(self):
        # Triton's interpreter leaves cycles behind
        gc.collect(1)
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_iter(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in known and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        if sum(self.sizes.values()) > self.peak:
            self.peak = max(self.peak, self.now())
        return result
