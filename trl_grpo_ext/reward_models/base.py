"""What process and outcome reward models share: loading by preset, and scoring in batches cut by tokens."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Self, cast

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, PreTrainedModel

from ..steps.policy_text import warn_of_template
from ..steps.segmentation import SegmentationLike, as_segmentation
from .backbone import Scorer
from .checkpoint import Checkpoint, locate_checkpoint, split_options
from .loading import load_scorer
from .preset import Preset
from .presets import resolve_preset
from .problem import LAST_USER, ProblemLike, ProblemReader
from .progress import scoring_bar
from .rendering import Problem, Rendered
from .token_budget import collate, most_forwards, token_batches


_BATCH_TOKENS = 16384

# What a process without batches runs, for the others not to wait for it for ever
_EMPTY = Rendered(ids=[0], prompt_length=0, score_positions=[])


class RewardModel:
    """
    What process and outcome reward models share; see [`ProcessRewardModel`] and [`OutcomeRewardModel`].

    It is called as TRL calls a reward function, and it is not an `nn.Module`: TRL takes those for sequence
    classifiers. `scorer` is the module, always in evaluation mode.

    Args:
        scorer ([`~trl_grpo_ext.reward_models.backbone.Scorer`]):
            The loaded model and what computes scores from its output.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's own.
        preset ([`Preset`]):
            How a solution becomes its input.
        name (`str`):
            Id or folder.
        max_length (`int`, *optional*):
            Largest number of ids of an input; unbounded by default.
        segmentation ([`Segmentation`], its argument `by` or a mapping of its arguments, *optional*):
            How completions are split into steps, and which part of them is judged; the preset's by default. An outcome
            model reads its `scope` and `thinking` alone.
        policy_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the policy, which decodes `completion_ids`. The trainer sets it.
        problem (`str`, `Mapping[str, str]` or `Callable`, *optional*, defaults to `"last_user"`):
            What of a prompt is the problem: `"last_user"`, `"conversation"`, a column of the data set as
            `{"column": name}`, or a function; see [`~trl_grpo_ext.reward_models.problem.ProblemReader`].

    What is out of the segmentation's scope is no part of the model's input. So with `scope="answer"` thinking takes
    none of the positions that the answer needs.

    Raises:
        ValueError: the preset is of the other kind, the tokenizer does not suit its rendering, or that rendering takes
            no conversation where `problem` is one.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        preset: Preset,
        name: str,
        max_length: int | None = None,
        segmentation: SegmentationLike | None = None,
        policy_tokenizer: Any = None,
        problem: ProblemLike = LAST_USER,
    ):
        if preset.kind != self.kind:
            raise ValueError(
                f"preset '{preset.name}' is of kind '{preset.kind}'; {type(self).__name__} needs another."
            )
        preset.rendering.check(tokenizer)
        self.scorer = scorer.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preset = preset
        self.name = name
        # TRL's logs show it
        self.__name__ = name.split("/")[-1]
        self.reduce = preset.reduce
        self.max_length = max_length
        self.segmentation = preset.segmentation if segmentation is None else as_segmentation(segmentation)
        self.policy_tokenizer = policy_tokenizer
        self.problem = problem
        self.batch_tokens = _BATCH_TOKENS
        # What the trainer that scores now has instead, see `prepare`
        self.trainer_batch_tokens: int | None = None
        self.accelerator: Accelerator | None = None
        scorer.backbone.shared_scores.register(self)

    @property
    def problem(self) -> ProblemLike:
        """What of a prompt is the problem."""
        return self._problem.problem

    @problem.setter
    def problem(self, problem: ProblemLike) -> None:
        self._problem = ProblemReader(problem, self.preset.rendering.takes_conversations)

    @property
    def required_columns(self) -> list[str]:
        """The columns that the data set must have."""
        return self._problem.required_columns

    @classmethod
    def from_pretrained(
        cls,
        model: "str | os.PathLike[str] | Checkpoint",
        *,
        preset: Preset | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        quantization_config: Any = None,
        tokenizer: Any = None,
        log_ratio_model: str | PreTrainedModel | None = None,
        weights_of: "RewardModel | None" = None,
        offload: bool = False,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        segmentation: SegmentationLike | None = None,
        problem: ProblemLike = LAST_USER,
        **loading: Any,
    ) -> Self:
        """
        Load a reward model without remote code, every key of its checkpoint accounted for.

        Args:
            model (`str`, `os.PathLike` or [`~trl_grpo_ext.reward_models.checkpoint.Checkpoint`]):
                Id on the Hub, folder, or what [`~trl_grpo_ext.reward_models.checkpoint.locate_checkpoint`] has found.
            preset ([`Preset`], `str` or `os.PathLike`, *optional*):
                A preset, the name of one of `PRESETS`, or the path of a YAML file; found by id and config by default.
            dtype (`torch.dtype` or `str`, *optional*):
                Of the backbone; heads are float32.
            quantization_config (*optional*):
                Of the backbone.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The model's own by default.
            log_ratio_model (`str` or `PreTrainedModel`, *optional*):
                The second model of a reading that needs log-ratios; the preset's by default.
            weights_of ([`RewardModel`], *optional*):
                A loaded reward model whose backbone is used instead of a second copy. `model` is then the same id (for
                another head, reading or segmentation), an adapter on the same base, or a checkpoint of a head alone.
                Reward models with the same inputs are scored together, by one forward per batch. Each adapter takes a
                forward of its own, since hidden states differ from its first layer on.
            offload (`bool`, *optional*, defaults to `False`):
                Keep the weights on the CPU, and on the trainer's device only while scoring. Excludes ZeRO-3 and
                quantisation.
            max_length (`int`, *optional*):
                Largest number of ids of an input; the preset's, else the model's positions, by default.
            batch_tokens (`int`, *optional*, defaults to `16384`):
                Largest number of padded tokens of a forward.
            segmentation ([`Segmentation`], its argument `by` or a mapping of its arguments, *optional*):
                How completions are split into steps, and which part of them is judged; the preset's by default.
            problem (`str`, `Mapping[str, str]` or `Callable`, *optional*, defaults to `"last_user"`):
                What of a prompt is the problem, see [`RewardModel`].
            **loading:
                Further arguments of `from_pretrained`, such as `revision`, `device_map` or `attn_implementation`.

        Raises:
            ValueError: no preset fits, or one of the other kind; the checkpoint lacks a key or has one that the preset
                does not know; a tag or an answer is not one id; `weights_of` has another backbone; the rendering takes
                no conversation where `problem` is one.
        """
        # Before the weights are loaded, which takes longer
        cut = None if segmentation is None else as_segmentation(segmentation)
        location, loading = split_options(loading)
        chosen = {"dtype": dtype, "quantization_config": quantization_config}
        loading |= {name: value for name, value in chosen.items() if value is not None}
        checkpoint = locate_checkpoint(model, location)
        found = resolve_preset(checkpoint.name, preset, checkpoint.config)
        ProblemReader(problem, found.rendering.takes_conversations)
        reward_model = cls._load(
            checkpoint,
            found,
            tokenizer,
            loading=loading,
            log_ratio_model=log_ratio_model,
            weights_of=weights_of,
            offload=offload,
        )
        if max_length is not None:
            reward_model.max_length = max_length
        if batch_tokens is not None:
            reward_model.batch_tokens = batch_tokens
        if cut is not None:
            reward_model.segmentation = cut
        reward_model.problem = problem
        return reward_model

    @classmethod
    def _load(
        cls,
        checkpoint: Checkpoint,
        preset: Preset,
        tokenizer: Any,
        *,
        loading: dict[str, Any],
        log_ratio_model: str | PreTrainedModel | None,
        weights_of: "RewardModel | None",
        offload: bool,
    ) -> Self:
        """[`RewardModel.from_pretrained`] of a located checkpoint, as a preset."""
        if preset.kind != cls.kind:
            raise ValueError(
                f"'{checkpoint.name}' is of kind '{preset.kind}' (preset '{preset.name}'), not '{cls.kind}'."
            )
        if tokenizer is None and weights_of is not None and weights_of.holds(checkpoint.base_name):
            tokenizer = weights_of.tokenizer
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.base_name, **checkpoint.base_location)
        # Before the weights are loaded, which takes longer
        preset.rendering.check(tokenizer)
        scorer = load_scorer(
            checkpoint,
            preset,
            tokenizer,
            loading=loading,
            log_ratio_model=log_ratio_model,
            shared=None if weights_of is None else weights_of.scorer,
            offload=offload,
        )
        max_length = checkpoint.max_positions if preset.max_length is None else preset.max_length
        reward_model = cls(scorer, tokenizer, preset, checkpoint.name, max_length)
        if weights_of is not None and weights_of.name == checkpoint.name:
            # Two sources with one name would log over each other
            reward_model.__name__ += f"-{preset.name}"
        return reward_model

    def prepare(self, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """
        Place the model as TRL places its own, once. From now on all processes run as many forwards as each other.

        Args:
            accelerator (`Accelerator`):
                The trainer's.
            policy_tokenizer (`PreTrainedTokenizerBase`):
                The policy's.
            batch_tokens (`int` or `None`):
                Largest number of padded tokens of a forward; `None` for the one that the model was made with.
        """
        self.scorer.prepare(accelerator)
        self.accelerator = accelerator
        # Another trainer may have set its own
        self.trainer_batch_tokens = batch_tokens
        self.policy_tokenizer = policy_tokenizer

    def holds(self, base_name: str, *, vocabulary: bool = False) -> bool:
        """
        Whether its backbone can be another reward model's.

        Args:
            base_name (`str`):
                Id or folder that the other's backbone would be loaded from.
            vocabulary (`bool`, *optional*, defaults to `False`):
                Whether the other needs the head over the vocabulary.
        """
        backbone = self.scorer.backbone
        return backbone.name == base_name and (backbone.causal or not vocabulary)

    def inputs_key(self) -> tuple[Any, ...]:
        """All that decides which input a solution becomes, and what the backbone makes of it."""
        preset = self.preset
        model = self.scorer.model
        inputs = (preset.kind, preset.rendering, preset.mask_tags, self.tokenizer, self.max_length)
        read = (self.problem, self.segmentation, self.policy_tokenizer)
        return *inputs, *read, model.backbone, model.adapter, self.accelerator

    @property
    def _source(self) -> str:
        """What it is called in errors and warnings."""
        return f"{self.kind} reward model '{self.name}'"

    def _problems(self, prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[Problem]:
        """The problem of each prompt."""
        return self._problem.read(prompts, columns, self._source, (self.policy_tokenizer, self.tokenizer))

    def _render(self, problem: Problem, steps: Sequence[str]) -> Rendered:
        rendered = self.preset.rendering.render(self.tokenizer, problem, steps, self.max_length)
        if steps and not rendered.ids:
            warn_of_template(self._source)
        return rendered

    def _score(self, solutions: Sequence[Rendered]) -> list[list[float]]:
        """One score for each score position of each solution."""
        return self.scorer.backbone.shared_scores.score(self, solutions, self._run)

    @torch.no_grad()
    def _run(self, solutions: Sequence[Rendered], reward_models: Sequence[Any]) -> list[list[list[float]]]:
        """
        Run the backbone in batches of at most `batch_tokens` tokens.

        Args:
            solutions (`Sequence[Rendered]`):
                The inputs.
            reward_models (`Sequence[RewardModel]`):
                This one and others with the same inputs.

        Returns:
            `list[list[list[float]]]`: for each reward model and each solution, one score for each score position.
        """
        batches = token_batches(
            [len(solution.ids) for solution in solutions], self.trainer_batch_tokens or self.batch_tokens
        )
        scorers = [cast(RewardModel, reward_model).scorer for reward_model in reward_models]
        scores: list[list[list[float]]] = [[[] for _ in solutions] for _ in scorers]
        log_probs = any(scorer.needs_log_probs for scorer in scorers)
        forwards = len(batches)
        if self.accelerator is not None:
            forwards = most_forwards(self.accelerator, forwards, self.accelerator.device)
        with ExitStack() as stack:
            # Each once, though several scorers may have it
            for backbone in dict.fromkeys(backbone for scorer in scorers for backbone in scorer.backbones):
                stack.enter_context(backbone.on_device())
            bar = stack.enter_context(scoring_bar(forwards, self.name, "batches"))
            for number in range(forwards):
                rows = batches[number] if number < len(batches) else []
                batch = collate(
                    [solutions[row] for row in rows] or [_EMPTY],
                    mask_tags=self.preset.mask_tags,
                    device=self.scorer.backbone.device,
                )
                output = self.scorer.model(batch, log_probs)
                for scorer, own in zip(scorers, scores, strict=True):
                    values = iter(scorer.score(output, batch).tolist())
                    for row in rows:
                        own[row] = [next(values) for _ in solutions[row].score_positions]
                bar.update()
        return scores
