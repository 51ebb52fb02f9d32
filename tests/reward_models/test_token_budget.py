"""Forwards of reward models cut by a budget of tokens."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_grpo_ext.reward_models.opening import prepare_reward_sources
from trl_grpo_ext.reward_models.token_budget import TokenBatchedModel, token_batches


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_completion_once_within_the_budget(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    # No batch could have taken the next completion as well
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * max(lengths[index] for index in [*batch, following[0]]) > max_tokens


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    size = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**size, **heads, initializer_range=0.5)).eval()


LENGTHS = [3, 9, 1, 9, 4, 7, 2, 5]


@pytest.mark.parametrize(
    ("max_tokens", "shapes"),
    [
        (1000, [(8, 9)]),
        (27, [(3, 9), (5, 5)]),
        (18, [(2, 9), (2, 7), (4, 4)]),
        (5, [(1, 9), (1, 9), (1, 7), (1, 5), (1, 4), (1, 3), (2, 2)]),
        (1, [(1, 9), (1, 9), (1, 7), (1, 5), (1, 4), (1, 3), (1, 2), (1, 1)]),
    ],
)
def test_scores_do_not_depend_on_the_budget_and_the_forwards_keep_to_it(classifier, max_tokens, shapes):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 30, mask.shape, generator=generator) * mask
    whole = classifier(input_ids=ids, attention_mask=mask).logits
    assert len(set(whole.flatten().tolist())) == len(LENGTHS)

    ran = []
    hook = classifier.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        batched = TokenBatchedModel(classifier, max_tokens, Accelerator(cpu=True))
        with torch.inference_mode():
            logits = batched(input_ids=ids, attention_mask=mask).logits
    finally:
        hook.remove()
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
    assert ran == shapes


def test_only_a_model_with_a_budget_is_wrapped(classifier):
    options = {"accelerator": Accelerator(cpu=True), "policy_tokenizer": None}

    def judge(**columns):
        return []

    assert prepare_reward_sources([classifier, judge], batch_tokens=None, **options) == [classifier, judge]
    wrapped, function = prepare_reward_sources([classifier, judge], batch_tokens=64, **options)
    assert isinstance(wrapped, TokenBatchedModel) and function is judge
