"""Readings against float64 computations over full logits, on tiny models without tokenizers."""

import math

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
    GraniteConfig,
    HyperCLOVAXConfig,
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
)
from trl_grpo_ext.reward_models.readings import (
    AnswerProbability,
    LabelSoftmax,
    LogitsReadOut,
    LogProbReadOut,
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
    logits = AnswerLogits(model, [good, bad])
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


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * np.vectorize(lambda value: (1 + math.erf(value / math.sqrt(2))) / 2)(x)


HEADS = {
    "one layer": (LinearHead("a.b", 3), ["a.b"], None),
    "a value head": (LinearHead("v_head.summary", 1), ["v_head.summary"], None),
    "without bias": (LinearHead("score", 1, bias=False), ["score"], None),
    "as wide as the backbone": (MLPHead("score", 2), ["score.0", "score.2"], relu),
    "GRM's": (MLPHead("v_head.summary", 1, widths=(7,)), ["v_head.summary.0", "v_head.summary.2"], relu),
    "three layers": (
        MLPHead("score", 3, bias=False, widths=(5, 9), activation="tanh"),
        ["score.0", "score.2", "score.4"],
        np.tanh,
    ),
    "layers with names": (
        MLPHead("classifier", 3, widths=(16,), keys=("dense", "out_proj"), activation="gelu"),
        ["classifier.dense", "classifier.out_proj"],
        gelu,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", HEADS)
def test_a_heads_outputs_equal_numpy(batch, shape):
    head, layers, activation = HEADS[shape]
    decoder, heads = with_head(head)
    weights = {key: value.double().numpy() for key, value in heads.state_dict().items()}
    biases = {f"{layer}.bias" for layer in layers} if head.bias else set()
    assert weights.keys() == {f"{layer}.weight" for layer in layers} | biases
    hidden = decoder(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).last_hidden_state
    x = hidden[batch.rows_R, batch.columns_R].double().numpy()
    for number, layer in enumerate(layers):
        x = x @ weights[f"{layer}.weight"].T + weights.get(f"{layer}.bias", 0)
        x = x if number == len(layers) - 1 else activation(x)
    np.testing.assert_allclose(heads(hidden, batch).numpy(), x, atol=1e-6, rtol=1e-6)


def test_a_head_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="activation is 'rellu'; known: .*relu"):
        MLPHead("score", 1, activation="rellu")
    with pytest.raises(ValueError, match=r"keys are \('a', 'b'\); expected 3, one for each layer"):
        MLPHead("score", 1, widths=(4, 4), keys=("a", "b"))
    with pytest.raises(TypeError, match="widths is 1024; expected a list, each of whose entries is a whole number"):
        MLPHead("score", 1, widths=1024)


@torch.no_grad()
def test_readings_equal_numpy():
    logits = 3 * torch.randn(5, 3)
    z = logits.double().numpy()
    for reading, outputs, expected in (
        (LabelSoftmax((1, 2)), 3, (np.exp(z) / np.exp(z).sum(-1, keepdims=True))[:, 1:].sum(-1)),
        (LabelSoftmax(), 2, 1 / (1 + np.exp(z[:, 0] - z[:, 1]))),
        (Sigmoid(), 1, 1 / (1 + np.exp(-z[:, 0]))),
        (SequenceScalar(), 1, z[:, 0]),
    ):
        np.testing.assert_allclose(reading.scores(logits[:, :outputs]).numpy(), expected, atol=1e-6)


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
        # Multiplied, where Granite's are divided
        (HyperCLOVAXConfig(**SIZES, logits_scaling=0.25), "logits_scaling"),
    ):
        with pytest.raises(ValueError, match=f"changes its logits .*{field}"):
            token_pair(causal(config), 7, 31)
    token_pair(causal(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), 7, 31)


@torch.no_grad()
def test_granites_logits_are_divided_as_its_model_divides_them(batch):
    model = causal(GraniteConfig(**SIZES, logits_scaling=8.0))
    logits = model(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.double()
    pair = logits[batch.rows_R, batch.columns_R][:, [7, 31]].softmax(-1)[:, 0]
    torch.testing.assert_close(token_pair(model, 7, 31)(batch).double(), pair, atol=1e-6, rtol=0)
    # The answers are the ids after the score positions
    shifted = batch._replace(columns_R=batch.columns_R - 1)
    answers = batch.input_ids_BL[batch.rows_R, batch.columns_R]
    expected = logits[shifted.rows_R, shifted.columns_R].softmax(-1).gather(-1, answers[:, None])[:, 0]
    scorer = Scorer(adapted(model, causal=True), LogProbReadOut(AnswerProbability()), log_probs=True)
    torch.testing.assert_close(scorer(shifted).double(), expected, atol=1e-6, rtol=0)
