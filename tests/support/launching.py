"""Two processes under each of the ways to share a model among them, from the repository's own accelerate configs."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.fork_server import end_tree


REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "recipes" / "accelerate_configs"

# With `--cpu`, or a config that says so, `accelerate launch` starts one process unless it is to be sharded
LAUNCHERS = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    **{
        name: [
            *("accelerate.commands.launch", "--config_file", str(CONFIGS / f"cpu_{name}.yaml")),
            *("--main_process_port", "0"),
        ]
        for name in ("fsdp2", "zero2", "zero3")
    },
}
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}


def launch(python: str, sharding: str, module: str, *arguments: str, timeout: float = 600) -> None:
    """
    Run a module in two processes that talk over gloo; a failure if either fails, or both take too long.

    The launcher and the two are started by the given Python, which may be that of the fork server.
    """
    if sharding.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("not installed: deepspeed")
    # With DeepSpeed, accelerate would leave that out
    cpu = {} if sharding.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [python, "-m", *LAUNCHERS[sharding], "-m", module, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, **cpu},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_tree(process.pid)
        printed, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{printed[-5000:]}")
    finally:
        if process.poll() is None:
            end_tree(process.pid)
    assert process.returncode == 0, printed[-5000:]
