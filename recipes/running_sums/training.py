"""What a run on running sums needs besides task and policy: arguments, TRL's settings, the start of a process."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import set_seed
from upstream_warnings import ignore_upstream_warnings

from running_sums.policy import WARM_UP_BATCH
from running_sums.task import MAX_COMPLETION_LENGTH, Problems, split_problems


@dataclass
class SumsArguments:
    """How long to run, where to write, and from which seed."""

    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Folder for all results."})
    seed: int = field(default=0, metadata={"help": "Seed of the problems, the policy and the sampling."})
    max_steps: int = field(default=120, metadata={"help": "GRPO updates."})
    num_prompts: int = field(default=16, metadata={"help": "Problems per GRPO update."})
    num_generations: int = field(default=8, metadata={"help": "Completions per problem: the size of a group."})
    num_held_out: int = field(default=512, metadata={"help": "Problems to evaluate on, before and after."})
    warmup_steps: int = field(default=500, metadata={"help": "Most updates of the supervised warm-up."})
    warmup_accuracy: float = field(default=0.45, metadata={"help": "Accuracy at which the warm-up stops."})
    log_credit: int = field(default=0, metadata={"help": "Groups recorded at each update, for the report."})


def problems_for(args: SumsArguments) -> Problems:
    """The problems of a run, as many as its arguments ask for."""
    return split_problems(
        args.seed,
        held_out=args.num_held_out,
        validation=256,
        warm_up=args.warmup_steps * WARM_UP_BATCH,
        grpo=args.max_steps * args.num_prompts,
    )


def training_settings(args: SumsArguments) -> dict[str, Any]:
    """Lengths, batch sizes, learning rate, logging: settings of TRL's own `GRPOConfig`, but for `log_credit`."""
    return {
        # The rate at which this small policy learns well is too high to stay stable, so it decays to 0
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "max_steps": args.max_steps,
        "num_generations": args.num_generations,
        "per_device_train_batch_size": args.num_prompts * args.num_generations // PartialState().num_processes,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "output_dir": args.output_dir,
        "seed": args.seed,
        "logging_steps": 1,
        "log_credit": args.log_credit,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        # All parameters are used; with several processes, DDP would search for unused ones and warn
        "ddp_find_unused_parameters": False,
        "bf16": False,
        "use_cpu": not torch.accelerator.is_available(),
    }


def start_process(seed: int) -> PartialState:
    """Seed this process, connect it with the others that were launched, and silence output about other models."""
    ignore_upstream_warnings()
    # These bars count the files of a model, and this one has a single file
    transformers.logging.disable_progress_bar()
    set_seed(seed)
    if not torch.accelerator.is_available():
        # On a model of this size more threads cost more than they gain
        torch.set_num_threads(1)
    # Without `cpu`, processes launched on a machine without a GPU would not find each other
    return PartialState(cpu=not torch.accelerator.is_available())
