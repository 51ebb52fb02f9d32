"""
Readings: from the output of a model to one score at each score position.

A reading says with `needs` what the model must have, and it builds the module that computes the scores:

| `needs` | the model | what [`scores`] is given | base class |
|---|---|---|---|
| `"head"` | a decoder, and the head that the preset names | the head's outputs | [`HeadReading`] |
| `"vocabulary"` | a causal language model | the logits of a few answers | [`AnswerReading`] |
| `"log_probs"` | a causal language model | the log-probability of each token | [`LogProbReading`] |
| `"log_ratio"` | two causal language models with one tokenizer | the log-ratio of each token | [`LogRatioReading`] |

A reading of your own is a subclass of one of the four, in a module of your own. A preset in YAML names it by its
import path, `type: my_package.my_module:MyReading`, and its other entries are the arguments of the class.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from .plain_data import CheckedFields
from .rendering import RenderedBatch, Rendering, check_shape
from .renderings import Turns
from .texts import check_texts


# What a model may have for a reading
_NEEDS = ("head", "vocabulary", "log_probs", "log_ratio")


class BackboneOutput(NamedTuple):
    """
    What a backbone computes for a [`RenderedBatch`].

    Args:
        hidden_BLH (`torch.Tensor` of shape `(B, L, H)`):
            Last hidden states.
        log_probs_BL (`torch.Tensor` of shape `(B, L)`, *optional*):
            Log-probability of each id after those before it, in nats; 0 for the first id of a row.
    """

    hidden_BLH: torch.Tensor
    log_probs_BL: torch.Tensor | None


class LoadedParts(Protocol):
    """What a loaded model gives a reading. Both modules map `(hidden_BLH, batch)` to logits of shape `(R, O)`."""

    def head(self) -> nn.Module:
        """The head that the preset names."""
        ...

    def answer_logits(self, answers: Sequence[str]) -> nn.Module:
        """The logits of answers of one id each: `O` rows of the model's head over the vocabulary."""
        ...


class Reading(CheckedFields, ABC):
    """
    What all readings share.

    Subclass [`HeadReading`], [`AnswerReading`], [`LogProbReading`] or [`LogRatioReading`].
    """

    needs: ClassVar[Literal["head", "vocabulary", "log_probs", "log_ratio"] | None] = None

    @property
    def needs_vocabulary(self) -> bool:
        """Whether the model must be a causal language model, with its head over the vocabulary."""
        return self.needs != "head"

    def check_outputs(self, outputs: int | None) -> None:
        """
        Check the head of a preset.

        Args:
            outputs (`int` or `None`):
                Number of outputs of the head; `None` if the preset has no head.

        Raises:
            ValueError: a head is missing, not needed, or has another number of outputs than the reading takes; or
                the class does not say what it needs.
        """
        name = type(self).__name__
        if self.needs not in _NEEDS:
            raise ValueError(
                f"the reading {name} has needs = {self.needs!r}; known: {', '.join(_NEEDS)}. Subclass HeadReading, "
                "AnswerReading, LogProbReading or LogRatioReading, which set it."
            )
        if self.needs == "head" and outputs is None:
            raise ValueError(f"the reading {name} needs a head; set `head`.")
        if self.needs != "head" and outputs is not None:
            raise ValueError(f"the reading {name} takes the model's vocabulary instead of a head; leave `head` out.")

    def check_rendering(self, rendering: Rendering) -> None:
        """
        Check the rendering of a preset.

        Args:
            rendering ([`~trl_grpo_ext.reward_models.rendering.Rendering`]):
                What makes the inputs.

        Raises:
            ValueError: its inputs lack what the reading needs.
        """

    @abstractmethod
    def build(self, parts: LoadedParts) -> nn.Module:
        """
        Build the module that computes the scores.

        Args:
            parts ([`LoadedParts`]):
                What the loaded model gives.

        Returns:
            `nn.Module`: maps the [`BackboneOutput`]s of the models that the reading needs, the reward model's first,
            and their [`RenderedBatch`] to scores of shape `(R,)`.
        """


class CheckedReadOut(nn.Module):
    """
    What a reading has built, with the shape of its scores checked.

    Args:
        reading ([`Reading`]):
            Builds the module, and is named in errors.
        parts ([`LoadedParts`]):
            What the loaded model gives.

    Raises:
        TypeError: the reading builds no module, or its module returns no tensor.
        ValueError: the module's scores have another shape than `(R,)`.
    """

    def __init__(self, reading: Reading, parts: LoadedParts):
        super().__init__()
        self.name = type(reading).__name__
        built: Any = reading.build(parts)
        if not isinstance(built, nn.Module):
            raise TypeError(f"the reading {self.name} has built {built!r}; expected an nn.Module.")
        self.built = built

    def forward(self, outputs: Sequence[BackboneOutput], batch: RenderedBatch) -> torch.Tensor:
        scores_R: Any = self.built(outputs, batch)
        if not isinstance(scores_R, torch.Tensor):
            raise TypeError(f"the reading {self.name} returned {type(scores_R).__name__}; expected a tensor.")
        check_shape(scores_R, (len(batch.rows_R),), f"the reading {self.name}")
        return scores_R


class LogitsReadOut(nn.Module):
    """
    The scores of a reading of logits.

    Args:
        logits (`nn.Module`):
            Maps `(hidden_BLH, batch)` to logits of shape `(R, O)`.
        reading ([`HeadReading`] or [`AnswerReading`]):
            Maps the logits to scores.
    """

    def __init__(self, logits: nn.Module, reading: "HeadReading | AnswerReading"):
        super().__init__()
        self.logits = logits
        self.reading = reading

    def forward(self, outputs: Sequence[BackboneOutput], batch: RenderedBatch) -> torch.Tensor:
        return self.reading.scores(self.logits(outputs[0].hidden_BLH, batch))


class LogProbReadOut(nn.Module):
    """
    The scores of a reading of one model's log-probabilities.

    Args:
        reading ([`LogProbReading`]):
            Maps the log-probabilities to scores.
    """

    def __init__(self, reading: "LogProbReading"):
        super().__init__()
        self.reading = reading

    def forward(self, outputs: Sequence[BackboneOutput], batch: RenderedBatch) -> torch.Tensor:
        log_probs_BL = outputs[0].log_probs_BL
        assert log_probs_BL is not None
        return self.reading.scores(log_probs_BL, batch)


class LogRatioReadOut(nn.Module):
    """
    The scores of a reading of two models' log-probabilities.

    Args:
        reading ([`LogRatioReading`]):
            Maps the log-ratios to scores.
    """

    def __init__(self, reading: "LogRatioReading"):
        super().__init__()
        self.reading = reading

    def forward(self, outputs: Sequence[BackboneOutput], batch: RenderedBatch) -> torch.Tensor:
        own_BL, other_BL = [output.log_probs_BL for output in outputs]
        assert own_BL is not None and other_BL is not None
        log_ratios_BL = own_BL - other_BL.to(own_BL.device)
        columns_L = torch.arange(own_BL.shape[1], device=own_BL.device)
        in_prompt_BL = columns_L < batch.prompt_lengths_B[:, None]
        return self.reading.scores(log_ratios_BL.masked_fill(in_prompt_BL, 0.0), batch)


class HeadReading(Reading):
    """
    A reading of the outputs of the head that the preset names.

    `head_outputs` is the number of outputs that the head must have; `None` allows any.
    """

    needs = "head"
    head_outputs: ClassVar[int | None] = None

    def check_outputs(self, outputs: int | None) -> None:
        """[`Reading.check_outputs`], and the number of outputs against `head_outputs`."""
        super().check_outputs(outputs)
        expected = self.head_outputs
        if expected not in (None, outputs):
            raise ValueError(
                f"the reading {type(self).__name__} takes a head whose `outputs` is {expected}, not {outputs}."
            )

    @abstractmethod
    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        """Scores of shape `(R,)` from the head's outputs of shape `(R, O)`, in float32."""

    def build(self, parts: LoadedParts) -> nn.Module:
        return LogitsReadOut(parts.head(), self)


class AnswerReading(Reading):
    """
    A reading of the logits that a causal language model gives to a few answers, each exactly one id.

    Only the answers' rows of the head over the vocabulary are used, so that the logits of the whole vocabulary never
    exist.
    """

    needs = "vocabulary"

    @abstractmethod
    def answer_texts(self) -> Sequence[str]:
        """The O answers as they follow other text."""

    @abstractmethod
    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        """Scores of shape `(R,)` from the answers' logits of shape `(R, O)`, in float32."""

    def build(self, parts: LoadedParts) -> nn.Module:
        answers = self.answer_texts()
        check_texts(answers, f"answer_texts() of the reading {type(self).__name__}")
        return LogitsReadOut(parts.answer_logits(answers), self)


class LogProbReading(Reading):
    """A reading of the log-probabilities that a causal language model gives to the ids of its input."""

    needs = "log_probs"

    @abstractmethod
    def scores(self, log_probs_BL: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """
        Scores from the log-probabilities of the ids.

        Args:
            log_probs_BL (`torch.Tensor` of shape `(B, L)`):
                `log p(y_t)` of each id after those before it, in nats and float32; 0 for the first id of a row.
            batch ([`RenderedBatch`]):
                The ids and the score positions.

        Returns:
            `torch.Tensor` of shape `(R,)`.
        """

    def build(self, parts: LoadedParts) -> nn.Module:
        return LogProbReadOut(self)


class LogRatioReading(Reading):
    """A reading of the log-ratios between a causal language model and a second one, the `log_ratio_model`."""

    needs = "log_ratio"

    @abstractmethod
    def scores(self, log_ratios_BL: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        """
        Scores from the log-ratios of the tokens.

        Args:
            log_ratios_BL (`torch.Tensor` of shape `(B, L)`):
                `log p(y_t) - log p_second(y_t)` of each id, in nats and float32; 0 before the first step.
            batch ([`RenderedBatch`]):
                The ids and the score positions.

        Returns:
            `torch.Tensor` of shape `(R,)`.
        """

    def build(self, parts: LoadedParts) -> nn.Module:
        return LogRatioReadOut(self)


@dataclass(frozen=True)
class LabelSoftmax(HeadReading):
    """
    The probability of the good labels, in [0, 1].

        score = sum_{o in indices} softmax(logits)_o

    Args:
        indices (`Sequence[int]`, *optional*, defaults to `(1,)`):
            The good labels.
    """

    indices: Sequence[int] = (1,)

    def check_outputs(self, outputs: int | None) -> None:
        """[`HeadReading.check_outputs`], and that the head has all labels."""
        super().check_outputs(outputs)
        for index in self.indices:
            if outputs is not None and not 0 <= index < outputs:
                raise ValueError(f"the reading LabelSoftmax takes label {index} of a head with {outputs} outputs.")

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        return logits_RO.softmax(-1)[:, list(self.indices)].sum(-1)


@dataclass(frozen=True)
class Sigmoid(HeadReading):
    """
    The sigmoid of the head's only output, in [0, 1].

        score = 1 / (1 + exp(-logit))
    """

    head_outputs = 1

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        return logits_RO[:, 0].sigmoid()


@dataclass(frozen=True)
class SequenceScalar(HeadReading):
    """The head's only output itself, unbounded."""

    head_outputs = 1

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        return logits_RO[:, 0]


@dataclass(frozen=True)
class TokenPair(AnswerReading):
    """
    The probability of a good answer against a bad one, in [0, 1].

        score = p(good) / (p(good) + p(bad)) = 1 / (1 + exp(logit_bad - logit_good))

    Args:
        good (`str`, *optional*, defaults to `"+"`):
            The good answer, exactly one id where it follows other text.
        bad (`str`, *optional*, defaults to `"-"`):
            The bad answer, exactly one id where it follows other text.
    """

    good: str = "+"
    bad: str = "-"

    def answer_texts(self) -> Sequence[str]:
        """The good answer and the bad one."""
        return self.good, self.bad

    def scores(self, logits_RO: torch.Tensor) -> torch.Tensor:
        return (logits_RO[:, 0] - logits_RO[:, 1]).sigmoid()


@dataclass(frozen=True)
class AnswerProbability(LogProbReading):
    """
    The probability of the answer that the rendering writes, over the whole vocabulary, in [0, 1].

        score = p(answer)

    For the rendering [`~trl_grpo_ext.reward_models.renderings.Turns`], whose score positions are followed by the
    answer. `TokenPair` compares the answer with one other instead.
    """

    def check_rendering(self, rendering: Rendering) -> None:
        """Raise `ValueError` if the rendering writes no answers."""
        if not isinstance(rendering, Turns):
            raise ValueError(
                f"the reading AnswerProbability reads the answers of the rendering Turns, and {rendering} writes none."
            )

    def scores(self, log_probs_BL: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        return log_probs_BL[batch.rows_R, batch.columns_R + 1].exp()


@dataclass(frozen=True)
class LogRatio(LogRatioReading):
    """
    Implicit rewards, unbounded (arXiv 2412.01981).

        score_k = beta * sum_{t <= k} (log p(y_t) - log p_second(y_t))

    The sum runs over the tokens of the answer up to the score position k.

    Args:
        beta (`float`, *optional*, defaults to `0.001`):
            Factor of the sum.
    """

    beta: float = 0.001

    def scores(self, log_ratios_BL: torch.Tensor, batch: RenderedBatch) -> torch.Tensor:
        return self.beta * batch.at_score_positions(log_ratios_BL.cumsum(-1))
