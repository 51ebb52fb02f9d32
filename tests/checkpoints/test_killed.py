"""A run that is killed again and again ends where a run that was left alone ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.checkpoints.runs import assert_same_run, complete_steps, make, seen, steps_of


ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "4"))
# One epoch is six steps
KILLED = {"max_steps": 1000, "save_total_limit": 2, "lr_scheduler_type": "constant"}


def train_and_be_killed(tiny_model, folder):
    torch.set_num_threads(1)
    started = folder.exists()
    make("lora", tiny_model, folder, **KILLED).train(resume_from_checkpoint=started)


def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(forked_python, tiny_model, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(0)
    command = [forked_python, "-m", "tests.checkpoints.test_killed", tiny_model, str(folder)]
    newest = incomplete = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 120
        while max(complete_steps(folder), default=0) <= newest:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        # Until the fork has ended too, which holds the pipe
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps = complete_steps(folder)
        incomplete += len(steps_of(folder)) - len(steps)
        assert steps and steps[-1] > newest
        newest = steps[-1]
    print(f"{KILLS} kills, {incomplete} incomplete checkpoints, the newest complete one at step {newest}")
    # On a slow machine it was killed after each step: into the second epoch all the same
    end = {**KILLED, "max_steps": max(newest, 5) + 2}
    resumed = make("lora", tiny_model, folder, **end)
    resumed.train(resume_from_checkpoint=True)
    expected = seen(resumed)
    # TRL seeds when a trainer is made
    whole = make("lora", tiny_model, tmp_path / "whole", **end)
    whole.train()
    assert whole.state.epoch > 1
    assert_same_run(expected, seen(whole))


if __name__ == "__main__":
    train_and_be_killed(sys.argv[1], Path(sys.argv[2]))
