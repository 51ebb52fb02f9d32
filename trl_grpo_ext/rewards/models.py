"""Reward models as reward sources: loading by preset, scoring in batches cut by tokens, and TRL's call."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from typing_extensions import Self

from ..collectives import gather
from .alignment import align_tokens
from .batching import token_batches
from .heads import LogRatio, LogRatioScorer, ReadBatch
from .loading import (
    length_limit,
    load_causal,
    load_reference,
    load_with_head,
    make_scorer,
    resolve_preset,
    whole_config,
)
from .policy_text import assistant_text, last_user_text, policy_steps, step_rewards
from .presets import Preset, find_preset
from .rendering import Rendered, encode_text
from .segmentation import Segmentation, segment, split_text
from .types import StepRewards


_BATCH_TOKENS = 16384
_PROGRESS_AFTER_SECONDS = 10

_PROBLEM = "Tom has 3 bags with 4 apples each and eats 2 of the apples. How many apples are left?"
_GOOD_STEPS = (
    "Step 1: There are 3 * 4 = 12 apples in the bags.",
    "Step 2: Tom eats 2 of them, so 12 - 2 = 10 apples are left.",
    "Step 3: The answer is \\boxed{10}.",
)
_BAD_STEPS = (
    "Step 1: There are 3 * 4 = 12 apples in the bags.",
    "Step 2: Tom eats 2 of them, so 12 - 2 = 34 apples are left.",
    "Step 3: The answer is \\boxed{34}.",
)
_CORRUPTED = 1


def collate(rendered: Sequence[Rendered], pad_id: int, mask_reads: bool, device: torch.device) -> ReadBatch:
    """Pad solutions on the right and note where each is read."""
    lengths = torch.tensor([len(one.ids) for one in rendered])
    ids = torch.full((len(rendered), int(lengths.max())), pad_id)
    for row, one in enumerate(rendered):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows = torch.tensor([row for row, one in enumerate(rendered) for _ in one.read_positions], dtype=torch.long)
    positions = torch.tensor([position for one in rendered for position in one.read_positions], dtype=torch.long)
    if mask_reads:
        mask[rows, positions] = 0
    prompts = torch.tensor([one.prompt_length for one in rendered])
    return ReadBatch(*(tensor.to(device) for tensor in (ids, mask, rows, positions, prompts)))


class RewardModel:
    """
    What process and outcome reward models share; see [`ProcessRewardModel`] and [`OutcomeRewardModel`].

    Callable with TRL's reward-function signature, and not an `nn.Module`: TRL takes those for sequence classifiers.
    `scorer` is the module, always in evaluation mode.
    """

    kind: ClassVar[str]

    def __init__(self, scorer: nn.Module, tokenizer: Any, preset: Preset, name: str, max_length: int | None = None):
        if preset.kind != self.kind:
            raise ValueError(
                f"preset '{preset.name}' is of kind '{preset.kind}'; {type(self).__name__} needs another."
            )
        preset.rendering.check(tokenizer)
        self.scorer = scorer.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preset = preset
        self.name = name
        # Read by TRL for its logs
        self.__name__ = name.rstrip("/").split("/")[-1]
        self.reduce = preset.reduce
        self.max_length = max_length
        self.batch_tokens = _BATCH_TOKENS
        self.accelerator: Accelerator | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        preset: Preset | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization_config: Any = None,
        tokenizer: Any = None,
        reference: str | PreTrainedModel | None = None,
        weights_of: "RewardModel | None" = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        **loading: Any,
    ) -> Self:
        """
        Load a reward model without remote code, every key of its head checked.

        Args:
            model (`str`):
                Id on the Hub, or folder.
            preset ([`Preset`] or `str`, *optional*):
                How it is fed and read, or the name of one of `PRESETS`; found from id and config by default.
            dtype (`torch.dtype` or `str`, *optional*):
                Of the backbone; heads are float32.
            quantization_config (*optional*):
                Of the backbone.
            tokenizer (*optional*):
                The model's own tokenizer by default.
            reference (`str` or `PreTrainedModel`, *optional*):
                Second model of a log-ratio; the preset's by default.
            weights_of ([`RewardModel`], *optional*):
                A reward model loaded from the same id or folder, whose weights are used instead of a second copy.
            max_length (`int`, *optional*):
                Longest input; the preset's, else the model's positions, by default.
            batch_tokens (`int`, *optional*, defaults to 16384):
                Padded tokens per forward.
            **loading:
                Further arguments of `from_pretrained`, such as `revision`, `device_map` or `attn_implementation`.

        Raises:
            ValueError: no preset fits; the checkpoint lacks a key or has one that the preset does not know; a tag or
                an answer is not one id.
        """
        if dtype is not None:
            loading["dtype"] = dtype
        if quantization_config is not None:
            loading["quantization_config"] = quantization_config
        source, config = whole_config(model, loading)
        preset = resolve_preset(model, preset, config)
        if preset.kind != cls.kind:
            raise ValueError(f"'{model}' is of kind '{preset.kind}' (preset '{preset.name}'), not '{cls.kind}'.")
        tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        preset.rendering.check(tokenizer)
        if weights_of is not None:
            loaded, reference = weights_of.shared_weights(model, preset, reference)
        elif preset.head is not None:
            loaded = load_with_head(model, preset, config, loading)
        else:
            loaded = load_causal(model, preset, loading)
        if isinstance(preset.reading, LogRatio):
            reference = load_reference(reference, preset, loading)
        if max_length is None:
            max_length = length_limit(config) if preset.max_length is None else preset.max_length
        scorer = make_scorer(loaded, preset, tokenizer, reference)
        reward_model = cls(scorer, tokenizer, preset, model, max_length)
        reward_model.batch_tokens = _BATCH_TOKENS if batch_tokens is None else batch_tokens
        return reward_model

    def shared_weights(self, model: str, preset: Preset, reference: Any) -> tuple[PreTrainedModel, Any]:
        """This model's modules for another reward model from the same folder, and the reference that goes with it."""
        if model != self.name or preset.head != self.preset.head:
            raise ValueError(f"weights_of holds '{self.name}' with head {self.preset.head}, not what '{model}' needs.")
        shares_reference = reference is None and isinstance(self.scorer, LogRatioScorer)
        return cast(PreTrainedModel, self.scorer.model), self.scorer.reference if shares_reference else reference

    def prepare(self, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Place the model as TRL places its own; from now on all processes run as many forwards as each other."""
        self.accelerator = accelerator
        self.scorer = accelerator.prepare_model(self.scorer, evaluation_mode=True, device_placement=True)
        if batch_tokens is not None:
            self.batch_tokens = batch_tokens

    def _render(self, problem: str, steps: Sequence[str]) -> Rendered:
        return self.preset.rendering.render(self.tokenizer, problem, steps, self.max_length)

    @torch.no_grad()
    def _read(self, rendered: Sequence[Rendered]) -> list[list[float]]:
        """Scores at the read positions of each solution, from forwards of at most `batch_tokens` tokens."""
        wanted = [index for index, one in enumerate(rendered) if one.read_positions]
        batches = token_batches([len(rendered[index].ids) for index in wanted], self.batch_tokens)
        scores: list[list[float]] = [[] for _ in rendered]
        forwards = len(batches)
        device = next(self.scorer.parameters()).device
        if self.accelerator is not None:
            forwards = int(gather(self.accelerator, torch.tensor([forwards], device=device)).max())
        for number in tqdm(range(forwards), desc=self.name, delay=_PROGRESS_AFTER_SECONDS, leave=False):
            # Past the last batch, a single token keeps a sharded model's other processes from waiting for ever
            rows = [wanted[index] for index in batches[number]] if number < len(batches) else []
            batch = collate(
                [rendered[row] for row in rows] or [Rendered([0], 0, [])], 0, self.preset.mask_reads, device
            )
            values = iter(self.scorer(batch).tolist())
            for row in rows:
                scores[row] = [next(values) for _ in rendered[row].read_positions]
        return scores


class ProcessRewardModel(RewardModel):
    """
    A process reward model: one score for each step of a solution.

    Usable as a reward function of [`GRPOExtTrainer`], where each score sits on its step's last policy token, and by
    itself.

    Args:
        scorer, tokenizer, preset, name, max_length:
            What [`~RewardModel.from_pretrained`] has loaded.
        segmentation ([`Segmentation`], *optional*):
            How completions are split; the preset's by default.
        policy_tokenizer (*optional*):
            Tokenizer of the policy, to read `completion_ids` with. The trainer sets it.

    Example:

    ```python
    >>> prm = ProcessRewardModel.from_pretrained("Qwen/Qwen2.5-Math-PRM-7B", dtype="bfloat16")
    >>> # One list for each solution, one score in [0, 1] for each of its steps
    >>> prm.score("What is 2 + 3 * 4?", ["3 * 4 = 12\n\n2 + 12 = 14", "2 + 3 = 5\n\n5 * 4 = 20"])
    ```
    """

    kind = "process"

    def __init__(
        self,
        scorer: nn.Module,
        tokenizer: Any,
        preset: Preset,
        name: str,
        max_length: int | None = None,
        segmentation: Segmentation | None = None,
        policy_tokenizer: Any = None,
    ):
        super().__init__(scorer, tokenizer, preset, name, max_length)
        self.segmentation = preset.segmentation if segmentation is None else segmentation
        self.policy_tokenizer = policy_tokenizer

    @classmethod
    def from_pretrained(cls, model: str, *, segmentation: Segmentation | None = None, **options: Any) -> Self:
        """[`RewardModel.from_pretrained`], and `segmentation`: how completions are split, instead of the preset's."""
        reward_model = super().from_pretrained(model, **options)
        if segmentation is not None:
            reward_model.segmentation = segmentation
        return reward_model

    def prepare(self, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """[`RewardModel.prepare`], and the policy's tokenizer unless one was given."""
        super().prepare(accelerator, policy_tokenizer, batch_tokens)
        if self.policy_tokenizer is None:
            self.policy_tokenizer = policy_tokenizer

    def score_steps(self, problems: Sequence[str], steps: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """
        Scores of steps that are already split.

        Args:
            problems (`Sequence[str]`):
                The problem of each solution.
            steps (`Sequence[Sequence[str]]`):
                The steps of each solution.

        Returns:
            `list[list[float | None]]`: as many as there are steps; `None` for those that did not fit into
            `max_length`, which are the last ones.

        Raises:
            ValueError: an empty step, or as many problems as solutions are not given.
        """
        if len(problems) != len(steps):
            raise ValueError(f"{len(problems)} problems for {len(steps)} solutions.")
        for index, own in enumerate(steps):
            if not all(step.strip() for step in own):
                raise ValueError(
                    f"solution {index}: step {[bool(step.strip()) for step in own].index(False)} is empty."
                )
        rendered = [self._render(problem, own) for problem, own in zip(problems, steps, strict=True)]
        return [
            [*values, *[None] * (len(own) - len(values))]
            for own, values in zip(steps, self._read(rendered), strict=True)
        ]

    def split(self, solution: str) -> list[str]:
        """Steps of a solution that is text, by `segmentation`; tokens are those of the reward model."""
        by = self.segmentation.by
        if by != "tokens" and self.segmentation == Segmentation(by=by):
            return [solution[start:end].strip() for start, end in split_text(solution, by)]
        aligned = align_tokens(self.tokenizer, encode_text(self.tokenizer, solution))
        return [step.text for step in segment(aligned, self.segmentation)]

    def score(self, problem: str, solutions: Sequence[str]) -> list[list[float | None]]:
        """Scores of the steps of solutions to one problem, `None` where unscored."""
        return self.score_steps([problem] * len(solutions), [self.split(solution) for solution in solutions])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[StepRewards | None]:
        """TRL's call of a reward function: scores on the policy's tokens, `None` for a completion without any."""
        source = f"process reward model '{self.name}'"
        steps = [policy_steps(self.policy_tokenizer, ids, self.segmentation, source) for ids in completion_ids]
        problems = [last_user_text(prompt) for prompt in prompts]
        scores = self.score_steps(problems, [[step.text for step in own] for own in steps])
        return [step_rewards(own, values) for own, values in zip(steps, scores, strict=True)]

    def self_check(self) -> None:
        """
        Score a right and a corrupted solution.

        Raises:
            ValueError: the corrupted step and those after it do not score lower, on average.
        """
        good, bad = self.score_steps([_PROBLEM] * 2, [_GOOD_STEPS, _BAD_STEPS])
        means = [fmean(math.nan if value is None else value for value in own[_CORRUPTED:]) for own in (good, bad)]
        _check_order(self, means[0], means[1], f"{good} and {bad}")


class OutcomeRewardModel(RewardModel):
    """
    An outcome reward model: one number for each solution.

    Usable as a reward function of [`GRPOExtTrainer`] and by itself.

    Example:

    ```python
    >>> orm = OutcomeRewardModel.from_pretrained("nvidia/AceMath-7B-RM", dtype="bfloat16")
    >>> # One number for each solution
    >>> orm.score("What is 2 + 3 * 4?", ["2 + 12 = 14", "5 * 4 = 20"])
    ```
    """

    kind = "outcome"

    def score_batch(self, problems: Sequence[str], solutions: Sequence[str]) -> list[float | None]:
        """One number for each solution; `None` for one that does not fit into `max_length`."""
        pairs = zip(problems, solutions, strict=True)
        read = self._read([self._render(problem, [solution]) for problem, solution in pairs])
        return [values[0] if values else None for values in read]

    def score(self, problem: str, solutions: Sequence[str]) -> list[float | None]:
        """One number for each solution to one problem."""
        return self.score_batch([problem] * len(solutions), solutions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's call of a reward function."""
        problems = [last_user_text(prompt) for prompt in prompts]
        return self.score_batch(problems, [assistant_text(completion) for completion in completions])

    def self_check(self) -> None:
        """
        Score a right and a corrupted solution.

        Raises:
            ValueError: the corrupted solution does not score lower.
        """
        good, bad = self.score(_PROBLEM, ["\n\n".join(_GOOD_STEPS), "\n\n".join(_BAD_STEPS)])
        _check_order(self, math.nan if good is None else good, math.nan if bad is None else bad, f"{good} and {bad}")


def load_reward_model(model: str, preset: Preset, **options: Any) -> ProcessRewardModel | OutcomeRewardModel:
    """[`RewardModel.from_pretrained`] of the class that is of the preset's kind."""
    kind = ProcessRewardModel if preset.kind == "process" else OutcomeRewardModel
    return kind.from_pretrained(model, preset=preset, **options)


def open_reward_model(model: str, loading: dict[str, Any]) -> RewardModel | PreTrainedModel:
    """
    What a bare id or folder in `reward_funcs` stands for.

    Args:
        model (`str`):
            Id on the Hub, or folder.
        loading (`dict[str, Any]`):
            Arguments of `from_pretrained`.

    Returns:
        A [`ProcessRewardModel`] or an [`OutcomeRewardModel`] where a preset knows the model, else, and for plain
        sequence classification, the model that TRL would load.

    Raises:
        ValueError: the checkpoint has no classification head, so that one with random weights would judge.
    """
    preset = find_preset(model, whole_config(model, loading)[1])
    if preset is not None and preset.name != "sequence-classification":
        # Presets never need remote code
        known = {name: value for name, value in loading.items() if name != "trust_remote_code"}
        return load_reward_model(model, preset, **known)
    loading = {"num_labels": 1, "output_loading_info": True, **loading}
    classifier, info = cast(Any, AutoModelForSequenceClassification.from_pretrained(model, **loading))
    if info["missing_keys"]:
        raise ValueError(
            f"reward_funcs: '{model}' fits no preset, and as a sequence classifier its weights "
            f"{', '.join(sorted(info['missing_keys']))} would be random. Load it with ProcessRewardModel or "
            "OutcomeRewardModel and a Preset that says how it is fed and read."
        )
    return classifier


def _check_order(model: RewardModel, good: float, bad: float, shown: str) -> None:
    # Also false for NaN
    if not good > bad:
        raise ValueError(
            f"self_check of '{model.name}' (preset '{model.preset.name}'): a right and a corrupted solution score "
            f"{shown}; the corrupted one must score lower. Is this the right preset, and the right checkpoint?"
        )
