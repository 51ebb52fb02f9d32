"""Two processes under DDP, FSDP2 and ZeRO-3 give the scores of one, with other numbers of forwards in each."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import reward_model_worker


pytestmark = pytest.mark.distributed

TIMEOUT = 240

COMMON = "compute_environment: LOCAL_MACHINE\nnum_machines: 1\nnum_processes: 2\n"
FSDP = """distributed_type: FSDP
use_cpu: true
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
"""
ZERO3 = """distributed_type: DEEPSPEED
use_cpu: false
deepspeed_config:
  deepspeed_config_file: {file}
  zero3_init_flag: true
"""
# Nothing is so small that it stays gathered
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
CONFIGS = {"ddp": None, "fsdp2": COMMON + FSDP, "zero3": COMMON + ZERO3}


def launch(config: str | None, folder: Path, *arguments: str) -> None:
    """Run the worker in two processes, and end both if they take too long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if config is None:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
        (folder / "accelerate.yaml").write_text(config.format(file=folder / "deepspeed.json"))
        launcher = ["accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        launcher += ["--main_process_port", port]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "tests.reward_model_worker", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"no end after {TIMEOUT} s:\n{printed[-5000:]}")
    assert process.returncode == 0, printed[-5000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    reward_model_worker.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one(models, tmp_path_factory):
    """What one process sees."""
    return reward_model_worker.score(models, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_scores_of_one(name, models, one, tmp_path):
    if name == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("not installed: deepspeed")
    launch(CONFIGS[name], tmp_path, str(models), str(tmp_path))
    two = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    # Each process holds a part of every weight, or all of them
    assert [seen["sharded"] for seen in (*two, one)] == [name == "zero3"] * 2 + [False]
    for part in ("trainer", "uneven", "none"):
        for source, expected in enumerate(one[part]):
            found = [values for seen in two for values in seen[part][source]]
            assert len({value for values in expected for value in values}) > 5
            for row, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
                assert ours == pytest.approx(theirs, abs=1e-5), (part, source, row)
