"""
One optimiser step of GRPO on a model of Qwen2.5-7B's exact shape, on a CPU, in less than 24 GB.

    python recipes/bench/seven_billion.py [--folder FOLDER] [--completion_tokens 8] [--json FILE]

The QLoRA recipe's own config and path (recipes/configs/qwen2.5_7b_qlora.yaml), with what a CPU needs changed: random
weights (random_nf4.py writes them on the first call, in a process of its own), float32 for what is computed, one group
of four short completions, and a rule in place of the reward model. Shows the seconds and the highest resident memory
of each part, and what recipes/bench/memory.py predicts. Fails unless the first step's exact KL is 0, and the adapter
and nothing else has changed.

bitsandbytes must not see the model in evaluation mode on a CPU with AVX512-BF16: it would repack the weights for
inference in bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


RECIPES = Path(__file__).parent.parent
sys.path.append(str(RECIPES))

import grpo  # noqa: E402
import memory  # noqa: E402

from trl_grpo_ext import GRPOExtTrainer, StepRewards  # noqa: E402


STEP_TOKENS = 4
LIMIT = 24 * 10**9
PROMPTS = ["7 + 5 =", "9 - 4 =", "3 + 8 =", "6 - 2 ="]
LARGEST_FIRST_KL = 1e-8
OUTSIDE = "outside"


def odd_steps(completion_ids: list[list[int]], **columns: Any) -> list[StepRewards]:
    """Process reward source: 1 for each step of four tokens that ends in an odd token id."""
    ends = [[*range(STEP_TOKENS - 1, len(ids) - 1, STEP_TOKENS), len(ids) - 1] for ids in completion_ids]
    return [
        StepRewards(ends=own, values=[float(ids[end] % 2) for end in own])
        for ids, own in zip(completion_ids, ends, strict=True)
    ]


def resident() -> int:
    """Bytes of this process in memory now, mapped files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest_resident() -> int:
    """The most there ever was, by the kernel's own count."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


class Parts:
    """Seconds and highest resident memory of the parts of a run; a part inside another is taken out of it."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, int] = defaultdict(int)
        self._inside = [OUTSIDE]
        self._since = time.perf_counter()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            part = self._inside[-1]
            self.memory[part] = max(self.memory[part], resident())
            time.sleep(0.02)

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def watch(self, owner: Any, method: str, name: str, without_gradients: str | None = None) -> None:
        """Count the calls of an object's method as a part, or as another one where no gradients are wanted."""
        call: Callable[..., Any] = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.of(name if torch.is_grad_enabled() else without_gradients or name):
                return call(*args, **kwargs)

        setattr(owner, method, counted)


def checksums(model: torch.nn.Module) -> dict[str, Any]:
    """Of every parameter that is not trained, from its bytes."""
    frozen = {name: p.detach().view(torch.uint8) for name, p in model.named_parameters() if not p.requires_grad}
    words = {name: data.flatten().view(torch.int64) for name, data in frozen.items()}
    return {name: torch.hash_tensor(data).view(torch.int64).item() for name, data in words.items()}


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def command_line(folder: Path, completion_tokens: int) -> list[str]:
    """The recipe's arguments, those that a CPU needs changed."""
    return f"""
        --config {RECIPES}/configs/qwen2.5_7b_qlora.yaml --model_name_or_path {folder} --dtype float32
        --use_cpu true --bf16 false --dataset {folder}/prompts.jsonl --dataset_options {{}} --system_prompt=
        --reward_funcs {__file__}:odd_steps --reward_model_options {{}} --reward_weights 1 --reward_transforms none
        --num_generations 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --max_steps 1
        --max_completion_length {completion_tokens} --lr_scheduler_type constant --warmup_steps 0
        --save_strategy no --output_dir {folder}/out
    """.split()


def prepare(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        # Another process, whose memory does not count
        subprocess.run([sys.executable, str(Path(__file__).with_name("random_nf4.py")), str(folder)], check=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))


def run(arguments: list[str]) -> tuple[Parts, GRPOExtTrainer, dict[str, Any]]:
    """Load and train; the parts, the trainer, and what was logged."""
    parts = Parts()
    with parts.of("load"):
        trainer = grpo.make_trainer(*grpo.make_parser().parse_args_and_config(arguments))
    model: Any = trainer.model
    with parts.of("checksums"):
        frozen = checksums(model)
        trained = adapters(model)
    parts.watch(trainer, "_generate", "generation")
    # TRL takes both models' log-probabilities by the same method
    parts.watch(trainer, "_get_per_token_logps_and_entropies", "loss, forward", without_gradients="reference")
    parts.watch(trainer, "_compute_loss", "loss, forward")
    parts.watch(trainer.accelerator, "backward", "loss, backward")
    with parts.of("optimiser step and the rest"):
        trainer.train()
    with parts.of("checksums"):
        if checksums(model) != frozen:
            raise RuntimeError("The step changed weights outside the adapter.")
        if not any((value != trained[name]).any() for name, value in adapters(model).items()):
            raise RuntimeError("The step did not change the adapter.")
    log = trainer.state.log_history[0]
    if not 0 <= log["kl"] < LARGEST_FIRST_KL:
        raise RuntimeError(f"The exact KL of the first step is {log['kl']}.")
    return parts, trainer, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/qwen2.5_7b_random_nf4"))
    parser.add_argument("--completion_tokens", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    prepare(options.folder)
    libraries = resident()
    arguments = command_line(options.folder, options.completion_tokens)
    parts, _, log = run(arguments)

    longest = str(max(len(prompt) for prompt in PROMPTS))
    recipe = memory.make_parser().parse_args_and_config([*arguments, "--prompt_tokens", longest])
    predicted = list(memory.parts(*recipe))
    console = Console()
    console.print(memory.as_table(predicted, "predicted by recipes/bench/memory.py"))
    table = Table("part", "seconds", "highest resident memory, GiB", title="measured")
    for name in [name for name in parts.seconds if name != OUTSIDE]:
        table.add_row(name, f"{parts.seconds[name]:.0f}", f"{parts.memory[name] / memory.GIB:.2f}")
    console.print(table)
    expected = libraries + memory.peak(predicted)
    measured = highest_resident()
    console.print(
        f"peak {measured / memory.GIB:.2f} GiB; predicted {expected / memory.GIB:.2f}, of which libraries "
        f"{libraries / memory.GIB:.2f}. One step {log['step_time']:.0f} s, {torch.get_num_threads()} threads. "
        f"kl {log['kl']:.2g}, kl/k3 {log['kl/k3']:.2g}, loss {log['loss']:.3g}, grad_norm {log['grad_norm']:.3g}"
    )
    if options.json is not None:
        figures = {"seconds": parts.seconds, "memory": parts.memory, "peak": measured, "predicted": expected}
        options.json.write_text(json.dumps({**figures, "libraries": libraries, "log": log}, indent=1))
    if measured > LIMIT:
        raise RuntimeError(f"{measured / 1e9:.1f} GB are more than {LIMIT / 1e9:.0f}.")


if __name__ == "__main__":
    main()
