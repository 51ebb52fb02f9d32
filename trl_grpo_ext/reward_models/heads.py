"""Heads on a backbone: those that presets describe, and the one over the vocabulary of a causal language model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .plain_data import CheckedFields
from .rendering import RenderedBatch, check_shape


# Tokens whose logits over the whole vocabulary exist at the same time
_CHUNK = 512


# ---------------------------------------------------------------------------------------------------------------------
# Heads of presets, under the key names of the checkpoint


def _text_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return config.get_text_config().to_dict()


def _add(parent: nn.Module, path: str, child: nn.Module) -> None:
    """Put a module at a dotted path, so that its keys are the checkpoint's."""
    first, _, rest = path.partition(".")
    if not rest:
        parent.add_module(first, child)
        return
    if first not in dict(parent.named_children()):
        parent.add_module(first, nn.Module())
    _add(parent.get_submodule(first), rest, child)


class Head(CheckedFields, ABC):
    """
    A head as a preset describes it: which layers it has, under which keys of the checkpoint, and what they compute.

    A preset in YAML names a head of your own by its import path. `outputs` is the number of outputs, O.
    """

    outputs: int

    @abstractmethod
    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """
        Add the layers, uninitialised.

        Args:
            model (`PreTrainedModel`):
                What they are added to, under the names that they have in the checkpoint.
            config (`PreTrainedConfig`):
                The checkpoint's config.
        """

    @abstractmethod
    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """
        Outputs at the score positions.

        Args:
            heads (`PreTrainedModel`):
                What [`Head.attach`] has added the layers to.
            hidden_BLH (`torch.Tensor` of shape `(B, L, H)`):
                Last hidden states of the backbone.
            batch ([`RenderedBatch`]):
                The ids and the score positions.

        Returns:
            `torch.Tensor` of shape `(R, O)`, float32.
        """


@dataclass(frozen=True)
class LinearHead(Head):
    """
    One linear layer.

    Args:
        name (`str`):
            Its path in the checkpoint, such as `"score"` or `"v_head.summary"`.
        outputs (`int`):
            Number of outputs.
        bias (`bool` or `str`, *optional*, defaults to `True`):
            Whether each layer has a bias, or the field of the model's config that says so.
    """

    name: str
    outputs: int
    bias: bool | str = True

    def _has_bias(self, config: PreTrainedConfig) -> bool:
        return self.bias if isinstance(self.bias, bool) else config.to_dict()[self.bias]

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add the layer to a model, uninitialised."""
        width = config.get_text_config().hidden_size
        _add(model, self.name, nn.Linear(width, self.outputs, bias=self._has_bias(config)))

    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """Outputs at the score positions, of shape `(R, O)`."""
        return heads.get_submodule(self.name)(batch.at_score_positions(hidden_BLH))


@dataclass(frozen=True)
class MLPHead(LinearHead):
    """
    Linear layers, one after the other, with an activation after each but the last.

    Args:
        widths (`Sequence[int]`, *optional*):
            Outputs of each layer but the last; by default one such layer, as wide as the backbone.
        keys (`Sequence[str]`, *optional*):
            Name of each layer in the checkpoint, below `name`. By default `"0"`, `"2"`, `"4"`, ..., the names in an
            `nn.Sequential` that holds the activations too.
        activation (`str`, *optional*, defaults to `"relu"`):
            The activation, as transformers names it: `"relu"`, `"gelu"`, `"silu"`, `"tanh"`, ...

    Raises:
        ValueError: an unknown activation, or another number of keys than of layers.
    """

    widths: Sequence[int] | None = None
    keys: Sequence[str] | None = None
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise ValueError(f"activation is {self.activation!r}; known: {', '.join(sorted(ACT2FN))}.")
        layers = 2 if self.widths is None else len(self.widths) + 1
        if self.keys is not None and len(self.keys) != layers:
            raise ValueError(f"keys are {self.keys!r}; expected {layers}, one for each layer.")

    def _paths(self) -> list[str]:
        layers = 2 if self.widths is None else len(self.widths) + 1
        keys = [str(2 * layer) for layer in range(layers)] if self.keys is None else self.keys
        return [f"{self.name}.{key}" for key in keys]

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add the layers to a model, uninitialised."""
        width = config.get_text_config().hidden_size
        inner = [width] if self.widths is None else self.widths
        sizes = [width, *inner, self.outputs]
        for path, inputs, outputs in zip(self._paths(), sizes, sizes[1:], strict=False):
            _add(model, path, nn.Linear(inputs, outputs, bias=self._has_bias(config)))

    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """Outputs at the score positions, of shape `(R, O)`."""
        *inner, last = [heads.get_submodule(path) for path in self._paths()]
        values = batch.at_score_positions(hidden_BLH)
        for layer in inner:
            values = ACT2FN[self.activation](layer(values))
        return last(values)


@dataclass(frozen=True)
class GatedObjectivesHead(Head):
    """
    ArmoRM: several objectives, weighted by a gate that looks at the prompt (arXiv 2406.12845).

        score = sum_o g_o (A^T r)_o
        g = logit_scale * softmax(MLP(h_gate) / temperature)

    `r` is the regression of the objectives at the score position, `A` the matrix `reward_transform_matrix`, and
    `h_gate` the hidden state at the token that ends the prompt.

    Args:
        gate_offset (`int`):
            Number of tokens from the first one of the answer back to the token that ends the user's message.
    """

    gate_offset: int
    outputs: int = field(default=1, init=False)

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add regression, matrix and gate to a model, uninitialised."""
        sizes = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3, **_text_fields(config)}
        objectives = sizes["num_objectives"]
        width = config.get_text_config().hidden_size
        model.add_module("regression_layer", nn.Linear(width, objectives, bias=False))
        model.register_parameter("reward_transform_matrix", nn.Parameter(torch.eye(objectives)))
        widths = [width, *[sizes["gating_hidden_dim"]] * sizes["gating_n_hidden"], objectives]
        layers = [nn.Linear(inner, outer) for inner, outer in zip(widths, widths[1:], strict=False)]
        _add(model, "gating.layers", nn.ModuleList(layers))
        model.get_submodule("gating").register_parameter("logit_scale", nn.Parameter(torch.ones(1)))

    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """The gated score at the score positions, of shape `(R, 1)`."""
        temperature = {"gating_temperature": 10.0, **_text_fields(heads.config)}["gating_temperature"]
        gate_columns_R = batch.prompt_lengths_B[batch.rows_R] - self.gate_offset
        gate = hidden_BLH[batch.rows_R, gate_columns_R].float()
        *inner, last = heads.get_submodule("gating.layers").children()
        for layer in inner:
            gate = F.relu(layer(gate))
        weights_RO = F.softmax(last(gate) / temperature, dim=-1) * heads.get_parameter("gating.logit_scale")
        objectives_RO = heads.get_submodule("regression_layer")(batch.at_score_positions(hidden_BLH))
        return (weights_RO * (objectives_RO @ heads.get_parameter("reward_transform_matrix"))).sum(-1, keepdim=True)


class Heads(PreTrainedModel):
    """
    The layers of a [`Head`], loaded by one `from_pretrained` from a whole model's checkpoint, apart from its backbone.

    They are float32, unquantised and whole on every device, whatever is done with the backbone.
    """

    config_class = PreTrainedConfig
    # Attention is the backbone's: without these, transformers refuses an `attn_implementation` of its config
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, head: Head):
        super().__init__(config)
        self.description = head
        head.attach(self, config)
        self.post_init()

    def forward(self, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """Outputs at the score positions, of shape `(R, O)`."""
        logits_RO = self.description.logits(self, hidden_BLH, batch)
        check_shape(
            logits_RO, (len(batch.rows_R), self.description.outputs), f"the head {type(self.description).__name__}"
        )
        return logits_RO


# ---------------------------------------------------------------------------------------------------------------------
# The head over the vocabulary


def vocabulary_head(model: PreTrainedModel) -> nn.Linear:
    """
    The head over the vocabulary of a causal language model.

    Raises:
        ValueError: it is not a plain linear layer, or the model changes its logits, which readings would not see.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{type(model).__name__} has no plain linear head over the vocabulary but {head}. If it is quantised or "
            "has an adapter, leave it out of that (bitsandbytes: llm_int8_skip_modules)."
        )
    config = _text_fields(model.config)
    changed = ["final_logit_softcapping", "logit_scale"]
    if not _divides_logits(model.config):
        changed.append("logits_scaling")
    found = {name: config[name] for name in changed if config.get(name) not in (None, 1)}
    if found:
        raise ValueError(f"{type(model).__name__} changes its logits ({found}); this reading takes them as they are.")
    return head


def _divides_logits(config: PreTrainedConfig) -> bool:
    """Whether logits are divided by the field `logits_scaling`; HyperCLOVA X multiplies by a field of this name."""
    return config.get_text_config().model_type.startswith("granite")


def _logits_divisor(config: PreTrainedConfig) -> float:
    """What a causal language model divides its logits by: 1 outside the Granite family."""
    return _text_fields(config)["logits_scaling"] if _divides_logits(config) else 1.0


class AnswerLogits(nn.Module):
    """
    Logits of a few ids at the score positions, in float32.

    The rows are copied, so that a head that ZeRO-3 shards never has to be gathered for them.

    Args:
        model (`PreTrainedModel`):
            A causal language model.
        ids (`Sequence[int]` of length O):
            The ids.
    """

    weight_OH: torch.Tensor
    bias_O: torch.Tensor

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]):
        super().__init__()
        head = vocabulary_head(model)
        self.divisor = _logits_divisor(model.config)
        rows = list(ids)
        bias_O = torch.zeros(len(rows)) if head.bias is None else head.bias.detach()[rows].float()
        self.register_buffer("weight_OH", head.weight.detach()[rows].float(), persistent=False)
        self.register_buffer("bias_O", bias_O, persistent=False)

    def forward(self, hidden_BLH: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """Logits of shape `(R, O)`."""
        return F.linear(batch.at_score_positions(hidden_BLH), self.weight_OH, self.bias_O) / self.divisor


class VocabularyLogProbs(nn.Module):
    """
    Log-probability of each id after those before it, over a chunk of tokens at a time.

    This is a module with the head's own weight, so that ZeRO-3 gathers the weight once per forward. Gathered once per
    chunk, processes with other numbers of chunks would wait for each other for ever.

    Args:
        model (`PreTrainedModel`):
            A causal language model. The weight of its head may be the embedding's.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        head = vocabulary_head(model)
        self.divisor = _logits_divisor(model.config)
        self.weight = head.weight
        self.bias = head.bias

    def forward(self, hidden_BLH: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of shape `(B, L)`, 0 in the first column, in float32 from logits in the head's dtype."""
        # The hidden state before an id predicts it
        hidden_MH = hidden_BLH[:, :-1].flatten(0, 1)
        ids_M = ids_BL[:, 1:].flatten()
        log_probs = []
        for chunk_MH, chunk_ids_M in zip(hidden_MH.split(_CHUNK), ids_M.split(_CHUNK), strict=True):
            logits_MV = F.linear(chunk_MH.to(self.weight), self.weight, self.bias).float() / self.divisor
            chosen_M = logits_MV.gather(-1, chunk_ids_M.to(logits_MV.device)[:, None])[:, 0]
            log_probs.append(chosen_M - logits_MV.logsumexp(-1))
        log_probs_BL = torch.cat(log_probs).view(len(ids_BL), -1).to(hidden_BLH.device)
        return F.pad(log_probs_BL, (1, 0))
