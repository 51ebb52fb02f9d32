"""How scores are read from a reward model's hidden states: heads and readings, described by data.

Everything is read at given positions only, in float32. Shapes: `B` solutions, `L` their padded ids, `R` read positions
of all solutions, `O` outputs of a head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel


class ReadBatch(NamedTuple):
    """
    Rendered solutions, padded on the right.

    Args:
        input_ids_BL (`torch.Tensor`):
            Ids.
        attention_mask_BL (`torch.Tensor`):
            1 where attention may look.
        rows_R, positions_R (`torch.Tensor`):
            Row and column of each read position.
        prompt_lengths_B (`torch.Tensor`):
            Ids before the first step.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    rows_R: torch.Tensor
    positions_R: torch.Tensor
    prompt_lengths_B: torch.Tensor

    def at_reads(self, values_BLx: torch.Tensor) -> torch.Tensor:
        """Values at the read positions, in float32."""
        return values_BLx[self.rows_R, self.positions_R].float()


# ---------------------------------------------------------------------------------------------------------------------
# Heads: what stands on the backbone, under the key names of the checkpoint


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
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


@dataclass(frozen=True)
class LinearHead:
    """
    One linear layer.

    Args:
        name (`str`):
            Its path in the checkpoint, such as `"score"` or `"v_head.summary"`.
        outputs (`int`):
            Number of outputs.
        bias (`bool` or `str`, *optional*, defaults to `True`):
            Whether it has a bias, or the field of the model's config that says so.
    """

    name: str
    outputs: int
    bias: bool | str = True

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add the layer to a model, uninitialised."""
        bias = self.bias if isinstance(self.bias, bool) else config.to_dict()[self.bias]
        _add(model, self.name, nn.Linear(config.get_text_config().hidden_size, self.outputs, bias=bias))

    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: ReadBatch) -> torch.Tensor:
        """Outputs at the read positions, of shape `(R, O)`."""
        return heads.get_submodule(self.name)(batch.at_reads(hidden_BLH))


@dataclass(frozen=True)
class MLPHead(LinearHead):
    """Two linear layers with a ReLU in between, the first as wide as the backbone: keys `NAME.0.*` and `NAME.2.*`."""

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add the layers to a model, uninitialised."""
        width = config.get_text_config().hidden_size
        _add(model, self.name, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.outputs)))


@dataclass(frozen=True)
class GatedObjectivesHead:
    """
    ArmoRM: several objectives at the last token, weighted by a gate that looks at the prompt (arXiv 2406.12845).

    `score = sum_o g_o (A^T r)_o`, with `r` the objectives' regression at the read position, `A` the matrix
    `reward_transform_matrix`, and `g = logit_scale * softmax(MLP(h_gate) / temperature)`.

    Args:
        gate_offset (`int`):
            Tokens from the start of the answer back to the one that the gate looks at: the token that ends the user's
            message.
    """

    gate_offset: int

    def attach(self, model: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Add regression, matrix and gate to a model, uninitialised."""
        sizes = {"num_objectives": 19, "gating_hidden_dim": 1024, "gating_n_hidden": 3, **_fields(config)}
        objectives, width = sizes["num_objectives"], config.get_text_config().hidden_size
        model.add_module("regression_layer", nn.Linear(width, objectives, bias=False))
        model.register_parameter("reward_transform_matrix", nn.Parameter(torch.eye(objectives)))
        widths = [width, *[sizes["gating_hidden_dim"]] * sizes["gating_n_hidden"], objectives]
        layers = [nn.Linear(inner, outer) for inner, outer in zip(widths, widths[1:], strict=False)]
        _add(model, "gating.layers", nn.ModuleList(layers))
        model.get_submodule("gating").register_parameter("logit_scale", nn.Parameter(torch.ones(1)))

    def logits(self, heads: PreTrainedModel, hidden_BLH: torch.Tensor, batch: ReadBatch) -> torch.Tensor:
        """The gated score at the read positions, of shape `(R, 1)`."""
        temperature = {"gating_temperature": 10.0, **_fields(heads.config)}["gating_temperature"]
        gates_R = batch.prompt_lengths_B[batch.rows_R] - self.gate_offset
        gate = hidden_BLH[batch.rows_R, gates_R].float()
        *inner, last = heads.get_submodule("gating.layers").children()
        for layer in inner:
            gate = F.relu(layer(gate))
        weights_RO = F.softmax(last(gate) / temperature, dim=-1) * heads.get_parameter("gating.logit_scale")
        objectives_RO = heads.get_submodule("regression_layer")(batch.at_reads(hidden_BLH))
        return (weights_RO * (objectives_RO @ heads.get_parameter("reward_transform_matrix"))).sum(-1, keepdim=True)


Head = LinearHead | MLPHead | GatedObjectivesHead


class Heads(PreTrainedModel):
    """
    A head described by data, loaded by one `from_pretrained` from a whole model's checkpoint, apart from its backbone.

    So the head is float32, unquantised and whole on every device, whatever is done with the backbone.
    """

    config_class = PreTrainedConfig
    # Attention is the backbone's
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig, head: Head):
        super().__init__(config)
        head.attach(self, config)
        self.post_init()


# ---------------------------------------------------------------------------------------------------------------------
# Readings: from a head's outputs, or from the vocabulary, to one score per read position


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
    config = _fields(model.config)
    scaled = {"final_logit_softcapping", "logit_scale", "logits_scaling"} & config.keys()
    found = {name: config[name] for name in scaled if config[name] not in (None, 1)}
    if found:
        raise ValueError(f"{type(model).__name__} changes its logits ({found}); this reading takes them as they are.")
    return head
