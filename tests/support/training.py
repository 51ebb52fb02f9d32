"""What the trainer tests share: small fast trainers, fixed completions, recorded gradients and dense logits."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer


# Read by the trainer where `rollout_func` is used
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

FIRST_CHARACTER, EOS = 4, 2
PROMPTS = ["1+2=", "3+4=", "ab", "cd"]


@dataclass
class FixedCompletions:
    """
    A `rollout_func` that hands out given rows in order, whatever the prompts: row `process_index * B + i` of a batch.

    With more rows than a batch takes, the next batch goes on where the last one ended; after the last row comes the
    first. Reward functions get the row's number as the column `row`.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    env_mask: list[list[int]] | None = None
    handed_out: int = field(default=0, init=False)

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        count = len(prompts)
        start = self.handed_out + trainer.accelerator.process_index * count
        self.handed_out += count * trainer.accelerator.num_processes
        rows = [(start + i) % len(self.completion_ids) for i in range(count)]
        output = {
            "prompt_ids": [self.prompt_ids[row] for row in rows],
            "completion_ids": [self.completion_ids[row] for row in rows],
            "logprobs": None,
            "row": rows,
        }
        if self.env_mask is not None:
            output["env_mask"] = [self.env_mask[row] for row in rows]
        return output

    def masks(self) -> list[list[int]]:
        return self.env_mask or [[1] * len(ids) for ids in self.completion_ids]


def fixed_completions(lengths: list[int], seed: int = 0, vocabulary: int = 45, **options: Any) -> FixedCompletions:
    """Random tokens: prompts of 2 to 4 tokens, completions of the given lengths that end with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(FIRST_CHARACTER, vocabulary, (count,), generator=generator).tolist()

    prompts = [tokens(2 + row % 3) for row in range(len(lengths))]
    return FixedCompletions(prompts, [[*tokens(length - 1), EOS] for length in lengths], **options)


class SetAttribute(TrainerCallback):
    """After step `n`, and before the next one, `values[n]` becomes the trainer's attribute of a name."""

    def __init__(self, name: str, values: dict[int, Any]):
        self.name = name
        self.values = values
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.values:
            setattr(self.trainer, self.name, self.values[state.global_step])


class Recorder(TrainerCallback):
    """Weights at the beginning of every optimizer step, and the gradients that it is made from."""

    def __init__(self):
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(gradients(model))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class BatchRecorder:
    """Mix-in before a trainer: the batches that it generated and scored, in the rows' order."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        vars(self).setdefault("batches", []).append(copy.copy(output))
        return output


class RecordingExtTrainer(BatchRecorder, GRPOExtTrainer):
    pass


def on_cpu() -> dict[str, Any]:
    """Arguments for training on the CPU, in as many processes as were started."""
    return {
        # With `use_cpu` accelerate leaves DeepSpeed out, and without it finds no backend
        "use_cpu": "ACCELERATE_USE_DEEPSPEED" not in os.environ,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        # For a process that waits for one that failed, and long enough for one that is slow on a busy machine
        "ddp_timeout": 300,
    }


def shard_all(args: Any) -> None:
    """
    Let FSDP and ZeRO-3 do on two CPU ranks and with a tiny model what they do elsewhere.

    To be called between making the arguments and the trainer.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # On CPUs accelerate trains an FSDP config with DDP, without a word
        assert args.distributed_state.distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = args.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    # By default it keeps all parameters gathered that are as small as these
    plugin.deepspeed_config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    # Hands the changed copy to `from_pretrained`
    plugin.set_deepspeed_weakref()


def make_trainer(
    trainer_class: type,
    model: Any,
    reward_funcs: Any,
    folder: Any,
    *,
    trainer_options: Any = None,
    prompt_repeats: int = 6,
    **config: Any,
) -> Any:
    """A trainer on the CPU that logs every step; by default with plain SGD, unclipped, at a constant learning rate."""
    options = {
        "output_dir": str(folder),
        **on_cpu(),
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "num_generations": 4,
        "max_completion_length": 16,
    }
    config_class = GRPOExtConfig if issubclass(trainer_class, GRPOExtTrainer) else GRPOConfig
    args: Any = config_class(**(options | config))
    shard_all(args)
    return trainer_class(
        model,
        reward_funcs,
        args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * prompt_repeats}),
        **(trainer_options or {}),
    )


def scored_batch(trainer: Any, count: int) -> dict[str, Any]:
    """A batch of `count` completions in evaluation mode, where no training loop has to run around the loss."""
    trainer.model.eval()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS * count][:count])


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def moved_policy(folder: str, distance: float = 0.05) -> Any:
    """The model in `folder` with noise on its weights; TRL loads the reference of it from `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += distance * torch.randn(parameter.shape, generator=generator)
    return model


def dense_logits(model: Any, rows: FixedCompletions, row: int, temperature: float) -> torch.Tensor:
    """`(T, V)` logits of one completion's tokens from the model's own forward, alone and unpadded."""
    prompt, completion = rows.prompt_ids[row], rows.completion_ids[row]
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1] / temperature


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    """Same parameters; the distance of each at most `rtol` of the whole gradient's norm."""
    assert found.keys() == expected.keys()
    scale = torch.stack([g.double().norm() for g in expected.values()]).norm()
    assert scale > 0
    for name, gradient in expected.items():
        distance = (found[name].double() - gradient.double()).norm()
        assert distance <= rtol * scale, f"{name}: {distance / scale:.1e} of the gradient's norm"
