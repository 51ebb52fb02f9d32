"""A run that is killed again and again ends where a run that was left alone ends."""

import multiprocessing
import os
import random
import signal
import time

import torch

from tests.checkpoints.runs import assert_same_run, complete_steps, make, seen, steps_of


KILLS = int(os.environ.get("KILLS", "4"))
# One epoch is six steps
KILLED = {"max_steps": 1000, "save_total_limit": 2, "lr_scheduler_type": "constant"}


def train_and_be_killed(tiny_model, folder):
    torch.set_num_threads(1)
    started = folder.exists()
    make("lora", tiny_model, folder, **KILLED).train(resume_from_checkpoint=started)


def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(tiny_model, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(0)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.checkpoints.test_killed"])
    newest = incomplete = 0
    for _ in range(KILLS):
        process = processes.Process(target=train_and_be_killed, args=(tiny_model, folder))
        process.start()
        until = time.monotonic() + 120
        while max(complete_steps(folder), default=0) <= newest:
            assert process.is_alive() and time.monotonic() < until, f"exit code {process.exitcode}"
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps = complete_steps(folder)
        incomplete += len(steps_of(folder)) - len(steps)
        assert steps and steps[-1] > newest
        newest = steps[-1]
    print(f"{KILLS} kills, {incomplete} incomplete checkpoints, the newest complete one at step {newest}")
    end = {**KILLED, "max_steps": newest + 2}
    resumed = make("lora", tiny_model, folder, **end)
    resumed.train(resume_from_checkpoint=True)
    expected = seen(resumed)
    # TRL seeds when a trainer is made
    whole = make("lora", tiny_model, tmp_path / "whole", **end)
    whole.train()
    assert whole.state.epoch > 1
    assert_same_run(expected, seen(whole))
