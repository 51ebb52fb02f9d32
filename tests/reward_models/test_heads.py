"""Readings against float64 computations over full logits, on tiny models without tokenizers."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
)

from trl_grpo_ext.reward_models import heads as heads_module
from trl_grpo_ext.reward_models.backbone import AdaptedBackbone, Backbone, Scorer
from trl_grpo_ext.reward_models.heads import (
    AnswerLogits,
    GatedObjectivesHead,
    Heads,
    LinearHead,
    MLPHead,
    vocabulary_head,
)
from trl_grpo_ext.reward_models.readings import (
    LabelSoftmax,
    LogitsReadOut,
    LogRatio,
    LogRatioReadOut,
    SequenceScalar,
    Sigmoid,
    TokenPair,
)
from trl_grpo_ext.reward_models.rendering import RenderedBatch


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
}
CONFIG = LlamaConfig(**SIZES, tie_word_embeddings=False, num_objectives=4, gating_hidden_dim=6, gating_n_hidden=2)


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([12, 7, 9])
    mask = (torch.arange(12) < lengths[:, None]).long()
    rows, positions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([5, 11, 6, 4, 5, 8])
    return RenderedBatch(ids, mask, rows, positions, torch.tensor([4, 5, 3]))


def causal(config=CONFIG, dtype=torch.float32):
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapted(model, causal):
    return AdaptedBackbone(Backbone(model, "model", causal=causal))


def token_pair(model, good, bad):
    logits = AnswerLogits(vocabulary_head(model), [good, bad])
    return Scorer(adapted(model, causal=True), LogitsReadOut(logits, TokenPair()))


def log_ratio(model, second, beta):
    readout = LogRatioReadOut(LogRatio(beta))
    return Scorer(adapted(model, causal=True), readout, adapted(second, causal=True))


@torch.no_grad()
def logits_at_score_positions(model, batch):
    """Full logits of each solution by itself, unpadded, in float64 from the hidden states on."""
    found = []
    for row, position in zip(batch.rows_R.tolist(), batch.columns_R.tolist(), strict=True):
        ids = batch.input_ids_BL[row : row + 1, : int(batch.attention_mask_BL[row].sum())]
        hidden = model.base_model(ids).last_hidden_state[0, position].double()
        found.append(hidden @ model.get_output_embeddings().weight.double().T)
    return torch.stack(found)


@torch.no_grad()
def test_a_token_pair_equals_the_softmax_over_two_entries_of_the_full_logits(batch):
    model = causal()
    expected = logits_at_score_positions(model, batch)[:, [7, 31]].softmax(-1)[:, 0]
    torch.testing.assert_close(token_pair(model, 7, 31)(batch).double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_token_pair_counts_the_heads_bias(batch):
    model = causal()
    plain = token_pair(model, 7, 31)(batch)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 2, 50))
    difference = float(model.lm_head.bias[7] - model.lm_head.bias[31])
    torch.testing.assert_close(token_pair(model, 7, 31)(batch).logit(), plain.logit() + difference)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_a_log_ratio_equals_the_sums_of_full_log_probabilities(batch, chunk, monkeypatch):
    monkeypatch.setattr(heads_module, "_CHUNK", chunk)
    model, second = causal(), causal()
    scores = log_ratio(model, second, beta=0.5)(batch)
    expected = []
    for row, position in zip(batch.rows_R.tolist(), batch.columns_R.tolist(), strict=True):
        ids = batch.input_ids_BL[row, : int(batch.attention_mask_BL[row].sum())]
        own, other = (m(ids[None]).logits[0].double().log_softmax(-1) for m in (model, second))
        answer = range(int(batch.prompt_lengths_B[row]), position + 1)
        expected.append(0.5 * sum(float(own[t - 1, ids[t]] - other[t - 1, ids[t]]) for t in answer))
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    assert log_ratio(model, model, beta=0.5)(batch).abs().max() == 0


def with_head(head):
    """A decoder and a head on it."""
    torch.manual_seed(1)
    heads = Heads(CONFIG, head)
    for parameter in heads.parameters():
        nn.init.normal_(parameter.data, std=0.5)
    return AutoModel.from_config(CONFIG).eval(), heads


def head_scorer(decoder, heads, reading):
    return Scorer(adapted(decoder, causal=False), LogitsReadOut(heads, reading))


@torch.no_grad()
def test_heads_and_readings_equal_numpy(batch):
    for head, reading, formula in (
        (
            LinearHead("a.b", 3),
            LabelSoftmax((1, 2)),
            lambda z: (np.exp(z) / np.exp(z).sum(-1, keepdims=True))[:, 1:].sum(-1),
        ),
        (MLPHead("score", 2), LabelSoftmax(), lambda z: 1 / (1 + np.exp(z[:, 0] - z[:, 1]))),
        (LinearHead("v_head.summary", 1), Sigmoid(), lambda z: 1 / (1 + np.exp(-z[:, 0]))),
        (LinearHead("score", 1, bias=False), SequenceScalar(), lambda z: z[:, 0]),
    ):
        decoder, heads = with_head(head)
        hidden = decoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state
        x = hidden[batch.rows_R, batch.columns_R].double().numpy()
        weights = {key: value.double().numpy() for key, value in heads.state_dict().items()}
        if isinstance(head, MLPHead):
            x = np.maximum(x @ weights["score.0.weight"].T + weights["score.0.bias"], 0)
            z = x @ weights["score.2.weight"].T + weights["score.2.bias"]
        else:
            z = x @ weights[f"{head.name}.weight"].T + weights.get(f"{head.name}.bias", 0)
        np.testing.assert_allclose(head_scorer(decoder, heads, reading)(batch).numpy(), formula(z), atol=1e-5)


@torch.no_grad()
def test_a_gate_looks_at_its_own_solutions_prompt(batch):
    head = GatedObjectivesHead(gate_offset=2)
    decoder, heads = with_head(head)
    scores = head_scorer(decoder, heads, SequenceScalar())(batch)
    hidden = decoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state.double()
    w = {key: value.double() for key, value in heads.state_dict().items()}
    for score, row, position in zip(scores, batch.rows_R.tolist(), batch.columns_R.tolist(), strict=True):
        gate = hidden[row, int(batch.prompt_lengths_B[row]) - 2]
        for layer in range(2):
            gate = (w[f"gating.layers.{layer}.weight"] @ gate + w[f"gating.layers.{layer}.bias"]).clamp(min=0)
        gate = ((w["gating.layers.2.weight"] @ gate + w["gating.layers.2.bias"]) / 10).softmax(-1)
        objectives = w["reward_transform_matrix"].T @ (w["regression_layer.weight"] @ hidden[row, position])
        expected = sum(float(g * o) for g, o in zip(gate, objectives, strict=True)) * float(w["gating.logit_scale"])
        assert float(score) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_padding_and_what_follows_a_score_position_change_nothing(batch):
    model, head = causal(), LinearHead("score", 2)
    scorers = [
        token_pair(model, 7, 31),
        log_ratio(model, causal(), 1.0),
        head_scorer(*with_head(head), LabelSoftmax()),
    ]
    ids = batch.input_ids_BL.clone()
    for row in range(3):
        last = int(batch.columns_R[batch.rows_R == row].max())
        ids[row, last + 1 :] = 49
    for scorer in scorers:
        torch.testing.assert_close(scorer(batch._replace(input_ids_BL=ids)), scorer(batch), atol=1e-6, rtol=1e-5)


def test_models_that_change_their_logits_are_refused():
    sizes = {**SIZES, "head_dim": 8}
    for config, field in (
        (Gemma2Config(**sizes, final_logit_softcapping=30.0), "final_logit_softcapping"),
        (CohereConfig(**SIZES, logit_scale=0.25), "logit_scale"),
    ):
        with pytest.raises(ValueError, match=f"changes its logits .*{field}"):
            token_pair(causal(config), 7, 31)
    token_pair(causal(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), 7, 31)
