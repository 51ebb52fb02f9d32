"""
A training whose reward server is killed again and again, against one whose server stays.

    python recipes/bench/server_outage.py [--steps 250] [--kills 6] [--away 180]

The server is this package's own, in another process, with a process reward model of random weights. It is killed
with SIGKILL at random moments of the training, `--kills` times at regular steps, and stays away for longer and longer,
in the end for `--away` seconds. The client has its default settings. At the end the weights must be, bit for bit,
those of the run whose server stayed: no reward is lost, made up or given to another completion. Exits with 1 where
they differ.
"""

import argparse
import logging
import multiprocessing
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, RemoteProcessRewardModel
from trl_grpo_ext.reward_models.remote.server import main as serve


CHARACTERS = "0123456789+-=;#"
SEGMENTATION = "regex:;"
PRESET = {
    "name": "outage",
    "kind": "process",
    "rendering": {"type": "Tagged", "tag": ";"},
    "reading": {"type": "LabelSoftmax"},
    "head": {"type": "LinearHead", "name": "score", "outputs": 2},
}
COMPLETIONS = 8


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def save_models(folder: Path) -> None:
    """A policy, a process reward model and its preset, with random weights."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    for name, model_class in {"policy": LlamaForCausalLM, "reward": LlamaForTokenClassification}.items():
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "preset.yaml").write_text(yaml.safe_dump(PRESET))


class Server:
    """The server, in a process that is forked from one that has imported all."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        preset = folder / "preset.yaml"
        options = ["--preset", str(preset), "--device", "cpu", "--port", str(self.port)]
        self._arguments = [str(folder / "reward"), *options]
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["trl_grpo_ext.reward_models.remote.server"])
        self.start()

    def start(self) -> None:
        self._process = self._processes.Process(target=serve, args=(self._arguments,), daemon=True)
        self._process.start()

    def wait_until_ready(self) -> None:
        while True:
            try:
                httpx.get(f"{self.url}/health", trust_env=False)
                return
            except httpx.TransportError:
                if not self._process.is_alive():
                    raise RuntimeError(f"the server ended with exit code {self._process.exitcode}.") from None
                time.sleep(0.1)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Outages(TrainerCallback):
    """Kills the server during some steps, and starts it again later."""

    def __init__(self, server: Server, seconds_at_step: dict[int, float]):
        self.server = server
        self.seconds_at_step = seconds_at_step
        self._rng = random.Random(0)
        self._outage: threading.Thread | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        seconds = self.seconds_at_step.get(state.global_step)
        if seconds is not None:
            self.join()
            # Anywhere in a step: before a request, while one waits or is scored, or between the two
            moment = self._rng.uniform(0.0, 0.2)
            self._outage = threading.Thread(target=self._run, args=(moment, seconds))
            self._outage.start()

    def _run(self, moment: float, seconds: float) -> None:
        time.sleep(moment)
        self.server.kill()
        time.sleep(seconds)
        self.server.start()

    def join(self) -> None:
        """Wait until the server runs again."""
        if self._outage is not None:
            self._outage.join()


class Waits(logging.Handler):
    """The waits that the client reports."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.ends: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        print(message, file=sys.stderr)
        if "answers again" in message:
            self.ends.append(message.rsplit(" after ")[-1])


def train(folder: Path, steps: int, url: str, callbacks: list[TrainerCallback]) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    args = GRPOExtConfig(
        output_dir=str(folder / "run"),
        supervision="process",
        max_steps=steps,
        per_device_train_batch_size=COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=12,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
    )
    source = RemoteProcessRewardModel(url, segmentation=SEGMENTATION)
    dataset = Dataset.from_dict({"prompt": [f"{first}+{second}=" for first in range(8) for second in range(8)]})
    policy = str(folder / "policy")
    trainer = GRPOExtTrainer(policy, [source], args, dataset, callbacks=callbacks)
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}


def measure(folder: Path, steps: int, kills: int, away: float) -> bool:
    """Train twice and print what happened; whether the weights are the same."""
    save_models(folder)
    waits = Waits()
    logging.getLogger("trl_grpo_ext.reward_models.remote.transport").addHandler(waits)
    server = Server(folder)
    try:
        server.wait_until_ready()
        started = time.monotonic()
        expected = train(folder, steps, server.url, [])
        undisturbed = time.monotonic() - started
        seconds_at_step = {steps * k // (kills + 1): away * k / kills for k in range(1, kills + 1)}
        outages = Outages(server, seconds_at_step)
        started = time.monotonic()
        found = train(folder, steps, server.url, [outages])
        disturbed = time.monotonic() - started
        outages.join()
    finally:
        server.kill()
    initial = LlamaForCausalLM.from_pretrained(folder / "policy").state_dict()
    moved = sum(not torch.equal(expected[name], initial[name]) for name in expected)
    same = sum(torch.equal(expected[name], found[name]) for name in expected)
    print(f"{steps} steps, {kills} kills, away for {', '.join(f'{s:.0f}' for s in seconds_at_step.values())} s")
    print(f"undisturbed {undisturbed:.0f} s, disturbed {disturbed:.0f} s; waits seen by the client: {waits.ends}")
    print(f"{same} of {len(expected)} tensors bit-equal, {moved} of them moved by training")
    return same == len(expected) == len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--away", type=float, default=180.0, help="seconds of the longest absence")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if measure(Path(folder), options.steps, options.kills, options.away) else 1)


if __name__ == "__main__":
    main()
