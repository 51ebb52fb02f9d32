"""What process and outcome reward models share: loading by preset, and scoring in batches cut by tokens."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from typing_extensions import Self

from ..distributed import gather
from .batching import collate, token_batches
from .loading import find_source, length_limit, load_scorer, resolve_preset
from .presets import Preset
from .rendering import Rendered
from .scorers import Scorer


_BATCH_TOKENS = 16384
_PROGRESS_AFTER_SECONDS = 10


class RewardModel:
    """
    What process and outcome reward models share; see [`ProcessRewardModel`] and [`OutcomeRewardModel`].

    Callable with TRL's reward-function signature, and not an `nn.Module`: TRL takes those for sequence classifiers.
    `scorer` is the module, always in evaluation mode.
    """

    kind: ClassVar[str]

    def __init__(self, scorer: Scorer, tokenizer: Any, preset: Preset, name: str, max_length: int | None = None):
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
        self.__name__ = name.split("/")[-1]
        self.reduce = preset.reduce
        self.max_length = max_length
        self.batch_tokens = _BATCH_TOKENS
        self.accelerator: Accelerator | None = None
        # Scores of the inputs that another reward model has just run through the same backbone
        self._left: dict[_Key, list[float]] = {}
        scorer.backbone.add_reward_model(self)

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
        offload: bool = False,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        **loading: Any,
    ) -> Self:
        """
        Load a reward model without remote code, every key of its head checked.

        Args:
            model (`str` or `os.PathLike`):
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
                A loaded reward model whose backbone is used instead of a second copy. `model` is then the same id (for
                another head, reading or segmentation), an adapter on the same base, or a checkpoint of a head alone.
                Reward models that are also fed alike are scored together, by one forward per batch; each adapter takes
                a forward of its own, since hidden states differ from its first layer on.
            offload (`bool`, *optional*, defaults to `False`):
                Keep the weights on the CPU, and on the trainer's device only while scoring. Excludes ZeRO-3 and
                quantisation.
            max_length (`int`, *optional*):
                Longest input; the preset's, else the model's positions, by default.
            batch_tokens (`int`, *optional*, defaults to 16384):
                Padded tokens per forward.
            **loading:
                Further arguments of `from_pretrained`, such as `revision`, `device_map` or `attn_implementation`.

        Raises:
            ValueError: no preset fits; the checkpoint lacks a key or has one that the preset does not know; a tag or
                an answer is not one id; `weights_of` holds another backbone.
        """
        if dtype is not None:
            loading["dtype"] = dtype
        if quantization_config is not None:
            loading["quantization_config"] = quantization_config
        source = find_source(model, loading)
        model = source.model
        preset = resolve_preset(model, preset, source.config)
        if preset.kind != cls.kind:
            raise ValueError(f"'{model}' is of kind '{preset.kind}' (preset '{preset.name}'), not '{cls.kind}'.")
        if tokenizer is None and weights_of is not None and weights_of.holds(source.base, vocabulary=False):
            tokenizer = weights_of.tokenizer
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source.base, **source.base_where)
        shared = None if weights_of is None else weights_of.scorer
        preset.rendering.check(tokenizer)
        scorer = load_scorer(source, preset, tokenizer, reference, shared, offload)
        if max_length is None:
            max_length = length_limit(source.config) if preset.max_length is None else preset.max_length
        reward_model = cls(scorer, tokenizer, preset, model, max_length)
        if weights_of is not None and weights_of.name == model:
            # Two sources with one name would log over each other
            reward_model.__name__ += f"-{preset.name}"
        reward_model.batch_tokens = _BATCH_TOKENS if batch_tokens is None else batch_tokens
        return reward_model

    def prepare(self, accelerator: Accelerator, policy_tokenizer: Any, batch_tokens: int | None) -> None:
        """Place the model as TRL places its own; from now on all processes run as many forwards as each other."""
        self.scorer.prepare(accelerator)
        self.accelerator = accelerator
        if batch_tokens is not None:
            self.batch_tokens = batch_tokens

    def _render(self, problem: str, steps: Sequence[str]) -> Rendered:
        return self.preset.rendering.render(self.tokenizer, problem, steps, self.max_length)

    def holds(self, source: str, vocabulary: bool) -> bool:
        """Whether its backbone was loaded from there, with a head over the vocabulary if that is needed."""
        return self.scorer.backbone.source == source and (self.scorer.backbone.causal or not vocabulary)

    def fed(self) -> tuple[Any, ...]:
        """What decides on the inputs that completions become, and on the hidden states of those."""
        preset, scorer = self.preset, self.scorer
        recipe = (preset.kind, preset.rendering, preset.mask_reads, self.tokenizer, self.max_length)
        return *recipe, scorer.backbone, scorer.adapter, self.accelerator

    def _read(self, rendered: Sequence[Rendered]) -> list[list[float]]:
        """Scores at the read positions: those that another reward model's forwards left, the others from its own."""
        left, self._left = self._left, {}
        wanted = {_key(one): one for one in rendered if one.read_positions}
        missing = {key: one for key, one in wanted.items() if key not in left}
        same_backbone = self.scorer.backbone.reward_models.values()
        others = [other for other in same_backbone if other is not self and other.fed() == self.fed()]
        own, *theirs = self._run(list(missing.values()), [self, *others])
        known = left | dict(zip(missing, own, strict=True))
        for other, scores in zip(others, theirs, strict=True):
            # Where some of the batch was known, it is not the first to score it, and others have left more for them
            kept = other._left if wanted.keys() & left.keys() else {}
            other._left = kept | dict(zip(missing, scores, strict=True))
        return [known[_key(one)] if one.read_positions else [] for one in rendered]

    @torch.no_grad()
    def _run(self, rendered: Sequence[Rendered], together: Sequence["RewardModel"]) -> list[list[list[float]]]:
        """Scores by each reward model of each solution, from forwards of at most `batch_tokens` tokens."""
        batches = token_batches([len(one.ids) for one in rendered], self.batch_tokens)
        scores: list[list[list[float]]] = [[[] for _ in rendered] for _ in together]
        scorers = [reward_model.scorer for reward_model in together]
        log_probs = any(scorer.needs_log_probs for scorer in scorers)
        forwards = len(batches)
        if self.accelerator is not None:
            counts = torch.tensor([forwards], device=self.accelerator.device)
            forwards = int(gather(self.accelerator, counts).max())
        with ExitStack() as stack:
            for backbone in {id(b): b for scorer in scorers for b in scorer.backbones}.values():
                stack.enter_context(backbone.awake())
            device = self.scorer.backbone.device
            for number in tqdm(range(forwards), desc=self.name, delay=_PROGRESS_AFTER_SECONDS, leave=False):
                # Past the last batch, a single token keeps a sharded model's other processes from waiting for ever
                rows = batches[number] if number < len(batches) else []
                solutions = [rendered[row] for row in rows] or [Rendered([0], 0, [])]
                batch = collate(solutions, 0, self.preset.mask_reads, device)
                output = self.scorer.run(batch, log_probs)
                for scorer, own in zip(scorers, scores, strict=True):
                    values = iter(scorer.read(*output, batch).tolist())
                    for row in rows:
                        own[row] = [next(values) for _ in rendered[row].read_positions]
        return scores


def check_solutions(solutions: Sequence[str]) -> None:
    """Raise `TypeError` for a single text, whose letters would be taken for solutions."""
    if isinstance(solutions, str):
        raise TypeError(f"solutions is a text, {solutions!r}; give a list of solutions.")


_Key = tuple[tuple[int, ...], int, tuple[int, ...]]


def _key(rendered: Rendered) -> _Key:
    """All that a score depends on, but for the model and whether tags are hidden from attention."""
    return tuple(rendered.ids), rendered.prompt_length, tuple(rendered.read_positions)
