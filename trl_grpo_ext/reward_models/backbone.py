"""The large part of reward models: loaded once, placed once, and run by all reward models that read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType
from peft import LoraModel, PeftConfig, PeftModel
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from .._trl import prepare_deepspeed
from .heads import ReadBatch, vocabulary_head


# Positions whose logits over the whole vocabulary exist at the same time
_CHUNK = 512


class VocabularyLogProbs(nn.Module):
    """
    Log-probability of every id after the first, over a chunk of positions at a time.

    A module with the head's own weight, so that ZeRO-3 gathers it once per forward: processes whose batches have other
    numbers of chunks would otherwise wait for each other for ever.

    Args:
        head (`nn.Linear`):
            The model's head over the vocabulary; its weight may be the embedding's.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden_BLH: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
        """Of shape `(B, L - 1)`, in float32 from logits in the head's dtype."""
        log_probs = []
        for hidden_NH, ids_N in zip(
            hidden_BLH[:, :-1].flatten(0, 1).split(_CHUNK), ids_BL[:, 1:].flatten().split(_CHUNK), strict=True
        ):
            logits_NV = F.linear(hidden_NH.to(self.weight), self.weight, self.bias).float()
            ids_N = ids_N.to(logits_NV.device)
            log_probs.append(logits_NV.gather(-1, ids_N[:, None])[:, 0] - logits_NV.logsumexp(-1))
        return torch.cat(log_probs).view(len(ids_BL), -1).to(hidden_BLH.device)


class HiddenStates(nn.Module):
    """
    What is placed and, under ZeRO-3, sharded: a decoder, and the head over the vocabulary where there is one.

    Args:
        decoder (`PreTrainedModel`):
            A transformer without head.
        head (`nn.Linear`, *optional*):
            Its head over the vocabulary.
    """

    def __init__(self, decoder: PreTrainedModel, head: nn.Linear | None):
        super().__init__()
        self.config = decoder.config
        # Under its name in the checkpoint, by which adapters find their layers
        self.name = decoder.base_model_prefix
        self.add_module(self.name, decoder)
        self.vocabulary = None if head is None else VocabularyLogProbs(head)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, log_probs: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states `(B, L, H)` and, if asked for, the ids' log-probabilities `(B, L - 1)`."""
        decoder = self.get_submodule(self.name)
        hidden_BLH = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if not log_probs:
            return hidden_BLH, None
        assert self.vocabulary is not None
        with torch.autocast(hidden_BLH.device.type, enabled=False):
            return hidden_BLH, self.vocabulary(hidden_BLH, input_ids)


class Backbone(nn.Module):
    """
    A loaded model without what reads it, with the adapters that reward models have put on it.

    Args:
        loaded (`PreTrainedModel`):
            A causal language model, or a decoder without head.
        source (`str`):
            Id or folder that it was loaded from.
        causal (`bool`):
            Whether it has a head over the vocabulary.
        offload (`bool`, *optional*, defaults to `False`):
            Whether it stays where it was loaded, with a copy on the accelerator's device while [`~Backbone.awake`].
    """

    def __init__(self, loaded: PreTrainedModel, source: str, causal: bool, offload: bool = False):
        super().__init__()
        self.hidden_states: nn.Module = HiddenStates(
            cast(PreTrainedModel, loaded.base_model), vocabulary_head(loaded) if causal else None
        )
        self.loaded = loaded
        self.causal = causal
        self.source = source
        self.offload = offload
        self.quantized = "quantization_config" in loaded.config.to_dict()
        self.adapters: PeftModel | None = None
        self.accelerator: Accelerator | None = None
        # Those that read it, in the order in which they were made, which is the same in all processes
        self.reward_models: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._active: str | None = None
        self._copy: dict[str, torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
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
            raise ValueError(f"reward model '{self.source}': {reason}")
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

    def add_reward_model(self, reward_model: Any) -> None:
        """Note one that reads this model."""
        self.reward_models[max(self.reward_models, default=0) + 1] = reward_model

    def add_adapter(self, config: PeftConfig) -> str:
        """Put an adapter on the model, its weights not loaded yet, and return its name."""
        if self.adapters is None:
            name = "adapter0"
            self.adapters = PeftModel(self.hidden_states, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            name = f"adapter{len(self.adapters.peft_config)}"
            self.adapters.add_adapter(name, config)
        # PEFT's own choice is none of ours
        self._active = ""
        return name

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The time in which it is scored: with `offload`, there is a copy on the accelerator's device meanwhile."""
        if self.offload and self.accelerator is not None:
            tensors = chain(self.hidden_states.named_parameters(), self.hidden_states.named_buffers())
            self._copy = {name: tensor.detach().to(self.accelerator.device) for name, tensor in tensors}
        try:
            yield
        finally:
            self._copy = None

    def activate(self, adapter: str | None) -> None:
        """Run with this adapter from now on; `None`: without any."""
        if self.adapters is None or adapter == self._active:
            return
        tuner = cast(LoraModel, self.adapters.base_model)
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter, inference_mode=True)
        self._active = adapter

    def forward(
        self, batch: ReadBatch, adapter: str | None = None, log_probs: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states, and log-probabilities if asked for, as [`HiddenStates`] gives them."""
        self.activate(adapter)
        inputs = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL, "log_probs": log_probs}
        if self._copy is None:
            return self.hidden_states(**inputs)
        return functional_call(self.hidden_states, self._copy, kwargs=inputs)


def _zero_stage(accelerator: Accelerator) -> int | None:
    """Stage of ZeRO; `None` without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return cast(DeepSpeedPlugin, accelerator.deepspeed_plugin).zero_stage
