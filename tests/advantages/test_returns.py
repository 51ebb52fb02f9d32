"""Discounted returns: the scan against the closed form, the oracle and the plain loop."""

import numpy as np
import pytest
import torch

from tests.support import oracles
from trl_grpo_ext.advantages.returns import discounted_returns, plain_discounted_returns


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_returns_equal_their_closed_form_over_4096_tokens(gamma, dtype, tolerance):
    rewards = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32).astype(np.float64)
    returns = discounted_returns(torch.tensor(rewards, dtype=dtype), gamma)
    # One more than a block, so that every place in a block has its turn
    some = range(0, 4096, 33)
    for i in range(3):
        expected = [oracles.discounted_return_closed_form(rewards[i], gamma, t) for t in some]
        scale = max(1.0, np.abs(expected).max())
        assert np.abs(returns[i, some].double().numpy() - expected).max() < tolerance * scale


def test_returns_do_not_underflow_over_32768_tokens():
    """`gamma ** t` is 0 in float32 from t = 987 for gamma 0.9: a division by it would give NaN."""
    rewards = torch.zeros(2, 32768)
    rewards[:, -1] = 1.0
    rewards[1, 20000] = 2.0
    returns = discounted_returns(rewards, 0.9)
    assert torch.isfinite(returns).all()
    assert returns[0, -8:].tolist() == pytest.approx([0.9**7, 0.9**6, 0.9**5, 0.9**4, 0.9**3, 0.9**2, 0.9, 1.0])
    assert returns[1, 19990:20001].tolist() == pytest.approx([2 * 0.9 ** (20000 - t) for t in range(19990, 20001)])
    assert returns[0, 0] < 1e-37
    assert discounted_returns(torch.ones(1, 32768), 1.0)[0, 0] == 32768


def test_returns_discount_only_where_a_step_ends():
    rewards, ends = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[True, False, True, False]])
    assert discounted_returns(rewards, 0.5).tolist() == [[1.5, 1.0, 2.0, 0.0]]
    assert discounted_returns(rewards, 0.5, ends).tolist() == [[2.0, 2.0, 2.0, 0.0]]
    rng = np.random.default_rng(1)
    rewards, ends = rng.normal(size=(5, 40)), rng.random((5, 40)) < 0.2
    returns = discounted_returns(torch.tensor(rewards), 0.8, torch.tensor(ends))
    np.testing.assert_allclose(returns.numpy(), oracles.discounted_returns(rewards, 0.8, ends), atol=1e-10)


@pytest.mark.parametrize(
    "rewards, ends, shape", [(torch.zeros(3), None, r"3"), (torch.zeros(2, 3), torch.zeros(2, 4), r"2, ?4")]
)
def test_returns_name_the_wrong_shape(rewards, ends, shape):
    with pytest.raises(ValueError, match=shape):
        discounted_returns(rewards, 0.9, ends)


# Lengths around one block of 32 tokens, around several, and around a block of blocks.
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("by_step", [False, True])
def test_the_scan_equals_the_plain_loop(by_step, gamma, length):
    rng = np.random.default_rng(length)
    rewards = torch.tensor(rng.normal(size=(3, length)))
    ends = torch.tensor(rng.random((3, length)) < 0.3) if by_step else None
    plain = plain_discounted_returns(rewards, gamma, ends)
    torch.testing.assert_close(discounted_returns(rewards, gamma, ends), plain, rtol=0, atol=1e-11)
    np.testing.assert_allclose(plain.numpy(), oracles.discounted_returns(rewards.numpy(), gamma, ends), atol=1e-11)


def test_scanning_some_completions_at_once_changes_no_bit(monkeypatch):
    """A large batch is scanned in parts, the last of which may be smaller."""
    rng = np.random.default_rng(2)
    rewards = torch.tensor(rng.normal(size=(7, 50)))
    ends = torch.tensor(rng.random((7, 50)) < 0.3)
    by_token = discounted_returns(rewards, 0.9)
    by_step = discounted_returns(rewards, 0.9, ends)
    for tokens in (1, 100, 199):
        monkeypatch.setattr("trl_grpo_ext.advantages.returns._SCAN_TOKENS", tokens)
        assert torch.equal(discounted_returns(rewards, 0.9), by_token)
        assert torch.equal(discounted_returns(rewards, 0.9, ends), by_step)


@pytest.mark.parametrize("function", [discounted_returns, plain_discounted_returns])
def test_returns_do_not_change_their_inputs(function):
    rewards = torch.ones(2, 40)
    ends = torch.ones(2, 40, dtype=torch.bool)
    function(rewards, 0.5, ends)
    assert (rewards == 1).all()
    assert ends.all()
