"""From a backbone's output to scores: what reads it, in float32, and the module that joins the two."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .backbone import Backbone
from .heads import Head, Heads, ReadBatch
from .readings import HeadReading


class HeadReader(nn.Module):
    """Reads a head's outputs at the read positions."""

    def __init__(self, heads: Heads, head: Head, reading: HeadReading):
        super().__init__()
        self.heads, self.head, self.reading = heads, head, reading

    def forward(self, hidden_BLH: torch.Tensor, batch: ReadBatch) -> torch.Tensor:
        return self.reading.scores(self.head.logits(self.heads, hidden_BLH, batch))


class TokenPairReader(nn.Module):
    """
    Reads the probability of one of two tokens at the read positions.

    Args:
        weight_VH (`torch.Tensor`), bias_V (`torch.Tensor`, *optional*):
            Of the head over the vocabulary.
        good, bad (`int`):
            The two ids.
    """

    direction_H: torch.Tensor

    def __init__(self, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, good: int, bad: int):
        super().__init__()
        # Kept apart, so that a sharded head never has to be gathered for it
        self.register_buffer("direction_H", weight_VH[good].float() - weight_VH[bad].float(), persistent=False)
        self.offset = 0.0 if bias_V is None else float(bias_V[good] - bias_V[bad])

    def forward(self, hidden_BLH: torch.Tensor, batch: ReadBatch) -> torch.Tensor:
        return (batch.at_reads(hidden_BLH) @ self.direction_H + self.offset).sigmoid()


class Scorer(nn.Module):
    """
    A backbone and what reads it.

    Args:
        backbone ([`Backbone`]):
            Possibly another scorer's too.
        reader (`nn.Module`, *optional*):
            From hidden states to scores; `None` for a log-ratio.
        adapter (`str`, *optional*):
            The backbone's adapter to run with.
    """

    def __init__(self, backbone: Backbone, reader: nn.Module, adapter: str | None = None):
        super().__init__()
        self.backbone, self.adapter = backbone, adapter
        self.reader = reader.to(backbone.device)

    @property
    def backbones(self) -> list[Backbone]:
        """All that [`~Scorer.read`] may run."""
        return [self.backbone]

    @property
    def needs_log_probs(self) -> bool:
        """Whether [`~Scorer.read`] needs the log-probabilities of the backbone's ids."""
        return False

    def prepare(self, accelerator: Any) -> None:
        """Place the backbones as TRL places its own reward models, and what reads them whole where their output is."""
        for backbone in self.backbones:
            backbone.prepare(accelerator)
        self.reader.to(self.backbone.device)

    def run(self, batch: ReadBatch, log_probs: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The backbone's output for a batch, which every scorer with the same backbone and adapter can read."""
        return self.backbone(batch, self.adapter, log_probs)

    def read(self, hidden_BLH: torch.Tensor, log_probs_BL: torch.Tensor | None, batch: ReadBatch) -> torch.Tensor:
        """Scores `(R,)` from the backbone's output."""
        return self.reader(hidden_BLH, batch)

    def forward(self, batch: ReadBatch) -> torch.Tensor:
        return self.read(*self.run(batch, self.needs_log_probs), batch)


class LogRatioScorer(Scorer):
    """
    Scores of a causal language model against a reference with the same tokenizer.

    Args:
        backbone, adapter:
            As in [`Scorer`].
        reference ([`Backbone`]), reference_adapter (`str`, *optional*):
            The second model.
        beta (`float`):
            Factor of the summed log-ratios.
    """

    def __init__(
        self,
        backbone: Backbone,
        reference: Backbone,
        beta: float,
        adapter: str | None = None,
        reference_adapter: str | None = None,
    ):
        super().__init__(backbone, nn.Identity(), adapter)
        self.reference, self.reference_adapter, self.beta = reference, reference_adapter, beta

    @property
    def backbones(self) -> list[Backbone]:
        return [self.backbone, self.reference]

    @property
    def needs_log_probs(self) -> bool:
        return True

    def read(self, hidden_BLH: torch.Tensor, log_probs_BL: torch.Tensor | None, batch: ReadBatch) -> torch.Tensor:
        reference_BL = self.reference(batch, self.reference_adapter, log_probs=True)[1]
        assert log_probs_BL is not None
        ratios_BL = log_probs_BL - reference_BL.to(log_probs_BL.device)
        columns_L = torch.arange(1, batch.input_ids_BL.shape[1], device=ratios_BL.device)
        answer_BL = columns_L >= batch.prompt_lengths_B[:, None]
        sums_BL = F.pad((ratios_BL * answer_BL).cumsum(-1), (1, 0))
        return self.beta * batch.at_reads(sums_BL)
