"""The large part of reward models: loaded once, placed once, and run by all reward models that score with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from peft import LoraModel, PeftConfig, PeftModel
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .._trl import prepare_deepspeed
from .heads import VocabularyLogProbs
from .readings import BackboneOutput
from .rendering import RenderedBatch
from .shared_scores import SharedScores


class HiddenStates(nn.Module):
    """
    The part that is placed and, under ZeRO-3, sharded: a decoder, and its head over the vocabulary if it has one.

    Args:
        decoder (`PreTrainedModel`):
            A transformer without head.
        vocabulary ([`~trl_grpo_ext.reward_models.heads.VocabularyLogProbs`], *optional*):
            Its head over the vocabulary.
    """

    def __init__(self, decoder: PreTrainedModel, vocabulary: VocabularyLogProbs | None):
        super().__init__()
        self.config = decoder.config
        # Under its name in the checkpoint, by which adapters find their layers
        self.name = decoder.base_model_prefix
        self.add_module(self.name, decoder)
        self.vocabulary = vocabulary

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, log_probs: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states of shape `(B, L, H)` and, if asked for, the ids' log-probabilities, `(B, L)`."""
        decoder = self.get_submodule(self.name)
        hidden_BLH = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if not log_probs:
            return hidden_BLH, None
        assert self.vocabulary is not None
        with torch.autocast(hidden_BLH.device.type, enabled=False):
            return hidden_BLH, self.vocabulary(hidden_BLH, input_ids)


class Backbone(nn.Module):
    """
    A loaded model with the adapters that reward models have put on it.

    `shared_scores` are the scores that its reward models have made for each other.

    Args:
        loaded (`PreTrainedModel`):
            A causal language model, or a decoder without head.
        name (`str`):
            Id or folder that it was loaded from.
        causal (`bool`):
            Whether it has a head over the vocabulary.
        offload (`bool`, *optional*, defaults to `False`):
            Whether it stays where it was loaded, with a copy on the accelerator's device during
            [`~Backbone.on_device`].
    """

    def __init__(self, loaded: PreTrainedModel, name: str, causal: bool, offload: bool = False):
        super().__init__()
        vocabulary = VocabularyLogProbs(loaded) if causal else None
        self.hidden_states: nn.Module = HiddenStates(cast(PreTrainedModel, loaded.base_model), vocabulary)
        self.loaded = loaded
        self.causal = causal
        self.name = name
        self.offload = offload
        self.quantized = "quantization_config" in loaded.config.to_dict()
        self.adapters: PeftModel | None = None
        self.accelerator: Accelerator | None = None
        self.shared_scores = SharedScores()
        self._active: str | None = None
        self._copy: dict[str, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        if self.accelerator is not None and (self.offload or _zero_stage(self.accelerator) == 3):
            return self.accelerator.device
        return next(self.hidden_states.parameters()).device

    def prepare(self, accelerator: Accelerator) -> None:
        """
        Place the model as TRL places its own reward models: sharded under ZeRO-3, else whole on every device.

        Raises:
            ValueError: it cannot be placed so; the message says why, and what to do instead.
        """
        if self.accelerator is not None:
            return
        stage = _zero_stage(accelerator)
        spread = accelerator.verify_device_map(self)
        if reason := self._obstacle(accelerator, stage, spread):
            raise ValueError(f"reward model '{self.name}': {reason}")
        self.accelerator = accelerator
        if stage is not None and not self.offload:
            self.hidden_states = prepare_deepspeed(self.hidden_states, accelerator)
        else:
            self.hidden_states = accelerator.prepare_model(
                self.hidden_states,
                evaluation_mode=True,
                device_placement=not (self.offload or self.quantized or spread),
            )

    def _obstacle(self, accelerator: Accelerator, stage: int | None, spread: bool) -> str | None:
        if spread and accelerator.distributed_type != DistributedType.NO:
            return "device_map spreads it over several devices, which works in a single process only."
        if self.quantized and stage == 3:
            return "ZeRO-3 cannot shard quantised weights; load it without quantization_config, or use ZeRO-2."
        if not self.offload:
            return None
        if stage == 3:
            return "offload=True cannot move what ZeRO-3 shards; leave it out, or have ZeRO-3 offload parameters."
        if self.quantized:
            return (
                "offload=True cannot move quantised weights, whose scales lie beside them; load it without one of the "
                "two."
            )
        return "offload=True and a device_map over several devices exclude each other." if spread else None

    def add_adapter(self, config: PeftConfig) -> str:
        """Put an adapter on the model, its weights not loaded yet, and return its name."""
        if self.adapters is None:
            name = "adapter0"
            self.adapters = PeftModel(self.hidden_states, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            name = f"adapter{len(self.adapters.peft_config)}"
            self.adapters.add_adapter(name, config)
        # PEFT has switched to an adapter of its own choice; no adapter has this name, so the next forward switches
        self._active = ""
        return name

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Run from the accelerator's device: with `offload`, a copy of the weights is there until the block ends."""
        if self.offload and self.accelerator is not None:
            tensors = chain(self.hidden_states.named_parameters(), self.hidden_states.named_buffers())
            self._copy = {name: tensor.detach().to(self.accelerator.device) for name, tensor in tensors}
        try:
            yield
        finally:
            self._copy = None

    def activate(self, adapter: str | None) -> None:
        """Run with this adapter from now on, or without any for `None`."""
        if self.adapters is None or adapter == self._active:
            return
        tuner = cast(LoraModel, self.adapters.base_model)
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter, inference_mode=True)
        self._active = adapter

    def forward(self, batch: RenderedBatch, adapter: str | None = None, log_probs: bool = False) -> BackboneOutput:
        """
        Run the model.

        Args:
            batch ([`RenderedBatch`]):
                Its input.
            adapter (`str`, *optional*):
                The adapter to run with; none by default.
            log_probs (`bool`, *optional*, defaults to `False`):
                Whether the ids' log-probabilities are computed.

        Returns:
            [`BackboneOutput`]
        """
        self.activate(adapter)
        inputs = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL, "log_probs": log_probs}
        if self._copy is None:
            return BackboneOutput(*self.hidden_states(**inputs))
        return BackboneOutput(*functional_call(self.hidden_states, self._copy, kwargs=inputs))


class AdaptedBackbone(nn.Module):
    """
    A backbone, and the adapter that a reward model runs it with.

    Args:
        backbone ([`Backbone`]):
            Possibly other reward models' too.
        adapter (`str`, *optional*):
            One of the backbone's adapters; none by default.
    """

    def __init__(self, backbone: Backbone, adapter: str | None = None):
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter

    def forward(self, batch: RenderedBatch, log_probs: bool = False) -> BackboneOutput:
        """[`Backbone.forward`] with the adapter."""
        return self.backbone(batch, self.adapter, log_probs)


class Scorer(nn.Module):
    """
    A model and the module that computes scores from its output.

    Args:
        model ([`AdaptedBackbone`]):
            The model.
        readout (`nn.Module`):
            What the preset's reading has built.
        log_ratio_model ([`AdaptedBackbone`], *optional*):
            The second model, for a reading that needs log-ratios.
        log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reading needs the log-probabilities of the ids; log-ratios always do.
    """

    def __init__(
        self,
        model: AdaptedBackbone,
        readout: nn.Module,
        log_ratio_model: AdaptedBackbone | None = None,
        log_probs: bool = False,
    ):
        super().__init__()
        self.needs_log_probs = log_probs or log_ratio_model is not None
        self.model = model
        self.readout = readout.to(model.backbone.device)
        self.log_ratio_model = log_ratio_model

    @property
    def backbone(self) -> Backbone:
        """The backbone of the model."""
        return self.model.backbone

    @property
    def backbones(self) -> list[Backbone]:
        """All backbones that scoring runs."""
        second = [] if self.log_ratio_model is None else [self.log_ratio_model.backbone]
        return [self.backbone, *second]

    def prepare(self, accelerator: Accelerator) -> None:
        """Place the backbones as TRL places its own reward models, and the read-out whole beside their output."""
        for backbone in self.backbones:
            backbone.prepare(accelerator)
        self.readout.to(self.backbone.device)

    def score(self, output: BackboneOutput, batch: RenderedBatch) -> torch.Tensor:
        """
        Scores from the model's output.

        Args:
            output ([`BackboneOutput`]):
                What `model` computes for the batch, with log-probabilities if they are needed. Several scorers with
                the same backbone and adapter can use it.
            batch ([`RenderedBatch`]):
                The batch.

        Returns:
            `torch.Tensor` of shape `(R,)`, float32.
        """
        outputs: Sequence[BackboneOutput] = [output]
        if self.log_ratio_model is not None:
            outputs = [output, self.log_ratio_model(batch, log_probs=True)]
        return self.readout(outputs, batch)

    def forward(self, batch: RenderedBatch) -> torch.Tensor:
        """Scores of shape `(R,)` of a batch."""
        return self.score(self.model(batch, self.needs_log_probs), batch)


def _zero_stage(accelerator: Accelerator) -> int | None:
    """Stage of ZeRO; `None` without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return cast(DeepSpeedPlugin, accelerator.deepspeed_plugin).zero_stage
