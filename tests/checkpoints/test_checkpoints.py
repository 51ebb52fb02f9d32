"""A run that is resumed is the run that was not interrupted, and what a kill leaves torn is known to be torn."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from peft import LoraConfig

from tests.support.adapters import CONTINUED, LORA, trained_adapter
from tests.support.training import make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.checkpoints import trainer as checkpointed_trainer
from trl_grpo_ext.checkpoints.folders import (
    MANIFEST_NAME,
    REFERENCE_NAME,
    check_complete,
    newest_complete,
    rotate_checkpoints,
    seal_checkpoint,
    what_is_missing,
)


SYNC = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
SETTINGS = {
    "lora": {**SYNC, "kl_estimator": "exact", "num_iterations": 3},
    "continued": {**SYNC, "kl_estimator": "k3", "gradient_accumulation_steps": 2, "num_iterations": 2},
    "continued, not moved": {"beta": 0.1, "kl_estimator": "exact", "num_iterations": 2},
    "full": {**SYNC, "kl_estimator": "exact", "steps_per_generation": 3},
    "full, one update": {**SYNC, "kl_estimator": "exact", "supervision": "process"},
}
STEPS = 7


def vowels(completion_ids, **kwargs):
    return [float(sum(token % 5 == 0 for token in ids)) for ids in completion_ids]


def make(kind, tiny_model, adapter, folder, **config):
    model, peft_config = tiny_model, LoraConfig(**LORA) if kind == "lora" else None
    if kind.startswith("continued"):
        model = trained_adapter(tiny_model, CONTINUED["lora"], adapter)
    options = {
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        **SETTINGS[kind],
        **config,
    }
    return make_trainer(GRPOExtTrainer, model, vowels, folder, trainer_options={"peft_config": peft_config}, **options)


def seen(trainer):
    """Weights of policy and reference, counters, and everything logged but times."""
    model = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    reference = {name: value.detach().clone() for name, value in trainer._reference_parameters().items()}
    log = [
        {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
        if "kl" in entry
    ]
    return model, reference, trainer.state.global_step, log


def assert_same_run(found, expected):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys() and ours
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_resumed_anywhere_is_the_run_that_was_not_interrupted(tiny_model, tmp_path, kind):
    trainer = make(kind, tiny_model, tmp_path / "adapter", tmp_path / "whole")
    trainer.train()
    expected = seen(trainer)
    # A continued adapter is another one each time
    start = make(kind, tiny_model, tmp_path / "adapter", tmp_path / "other")
    assert any(not torch.equal(value, expected[1][name]) for name, value in seen(start)[1].items())
    for step in range(1, STEPS):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / str(step) / f"checkpoint-{step}")
        trainer = make(kind, tiny_model, tmp_path / "adapter", tmp_path / str(step), save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert_same_run(seen(trainer), expected)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """A run's folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    make("lora", tiny_model, None, folder, max_steps=2).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_with_any_file_missing_or_cut_short_is_torn(run, caplog):
    checkpoint = run / "checkpoint-2"
    assert what_is_missing(checkpoint) is None
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    assert {REFERENCE_NAME, "batch_0.pt", "optimizer.pt", "trainer_state.json"} <= {
        path.relative_to(checkpoint).as_posix() for path in files
    }
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert f"{path.relative_to(checkpoint)} has {len(content) - 1} bytes" in what_is_missing(checkpoint)
        path.unlink()
        assert f"{path.relative_to(checkpoint)} is missing" in what_is_missing(checkpoint)
        assert newest_complete(run) == run / "checkpoint-1"
        with pytest.raises(ValueError, match=f"checkpoint-2 is not a complete checkpoint: .*{path.name} is missing"):
            check_complete(checkpoint)
        path.write_bytes(content)
    assert newest_complete(run) == checkpoint
    assert "Passing over the torn checkpoint" in caplog.text


def test_without_a_complete_checkpoint_the_error_names_the_torn_ones(run, tiny_model):
    (run / "checkpoint-1" / "optimizer.pt").unlink()
    (run / "checkpoint-2" / MANIFEST_NAME).write_text('{"complete": false}')
    trainer = make("lora", tiny_model, None, run)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 \(it is being written.*checkpoint-1 \(optimizer.pt is missing"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint in .*nowhere.*Torn ones: none"):
        newest_complete(run / "nowhere")


def test_checkpoints_of_trl_are_taken_unless_their_last_file_is_missing(run):
    checkpoint = run / "checkpoint-2"
    (checkpoint / MANIFEST_NAME).unlink()
    assert newest_complete(run) == checkpoint
    (checkpoint / "trainer_state.json").write_text('{"epoch": 0.')
    assert newest_complete(run) == run / "checkpoint-1"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"complete": 1'])
def test_a_manifest_that_is_damaged_is_a_torn_checkpoint(run, content):
    (run / "checkpoint-2" / MANIFEST_NAME).write_text(content)
    assert what_is_missing(run / "checkpoint-2") == f"{MANIFEST_NAME} is missing or torn"
    assert newest_complete(run) == run / "checkpoint-1"


def test_what_transformers_marks_as_incomplete_while_it_is_preempted_is(run):
    (run / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()
    assert newest_complete(run) == run / "checkpoint-1"
    seal_checkpoint(run / "checkpoint-2")
    (run / "checkpoint-2" / "checkpoint-is-incomplete.txt").unlink()
    assert newest_complete(run) == run / "checkpoint-2"


def test_checkpoints_are_ordered_by_step_and_others_folders_left_alone(run):
    (run / "checkpoint-2").rename(run / "checkpoint-10")
    (run / "checkpoint-1").rename(run / "checkpoint-9")
    (run / "checkpoint-best").mkdir()
    assert newest_complete(run) == run / "checkpoint-10"
    rotate_checkpoints(run, 1, {run / "checkpoint-9"})
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-best"}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, {1, 2, 3, 9}), (1, None, {3}), (2, None, {2, 3}), (1, 1, {1, 3}), (2, 1, {1, 3}), (3, 1, {1, 2, 3})],
)
def test_rotation_keeps_the_newest_complete_and_the_best(run, limit, best, left):
    """Of 1, 2 and 3, written in this order, and a torn one with a higher number."""
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    for step in (1, 2, 3):
        os.utime(run / f"checkpoint-{step}", ns=(step, step))
    (run / "checkpoint-9").mkdir()
    rotate_checkpoints(run, limit, {run / "checkpoint-3", *([run / f"checkpoint-{best}"] if best else [])})
    assert {int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")} == left


def test_resumed_after_a_torn_checkpoint_the_complete_one_stays_until_there_is_another(run, tiny_model):
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-9").mkdir()
    make("lora", tiny_model, None, run, save_total_limit=1, max_steps=3).train(resume_from_checkpoint=True)
    assert complete_steps(run) == [3]
    arguments = torch.load(run / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 1


def test_resumed_in_the_same_trainer_and_from_a_path_it_is_the_same_run(tiny_model, tmp_path):
    trainer = make("lora", tiny_model, None, tmp_path)
    trainer.train()
    expected = seen(trainer)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert_same_run(seen(trainer), expected)


def test_a_batch_made_with_other_settings_is_not_used(run, tiny_model, caplog):
    trainer = make("lora", tiny_model, None, run, max_steps=4, gradient_accumulation_steps=2, num_iterations=2)
    trainer.train(resume_from_checkpoint=True)
    assert "was made with other settings" in caplog.text
    assert trainer.state.global_step == 4


def test_a_checkpoint_that_is_written_anew_keeps_nothing_of_the_one_before(run, tiny_model):
    assert (run / "checkpoint-2" / "batch_0.pt").is_file()
    make("lora", tiny_model, None, run, max_steps=2, num_iterations=1, sync_ref_model=False).train()
    assert what_is_missing(run / "checkpoint-2") is None
    assert not (run / "checkpoint-2" / "batch_0.pt").exists()
    assert not (run / "checkpoint-2" / REFERENCE_NAME).exists()


def test_the_reference_of_a_checkpoint_must_be_the_one_that_the_run_needs(run, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="holds a reference that had moved.*sync_ref_model=True"):
        make("lora", tiny_model, None, run, sync_ref_model=False).train(resume_from_checkpoint=True)
    make("lora", tiny_model, None, run, beta=0.0, sync_ref_model=False, kl_estimator="k3", max_steps=3).train(
        resume_from_checkpoint=True
    )
    still = {"sync_ref_model": False, "save_steps": 1}
    make("lora", tiny_model, None, tmp_path / "still", max_steps=1, **still).train()
    assert not (tmp_path / "still" / "checkpoint-1" / REFERENCE_NAME).exists()
    with pytest.raises(ValueError, match="checkpoint-1 does not hold it.*sync_ref_model=False"):
        make("lora", tiny_model, None, tmp_path / "still").train(resume_from_checkpoint=True)
    make("lora", tiny_model, None, tmp_path / "still", max_steps=2, **still).train(resume_from_checkpoint=True)


def test_a_reference_of_another_adapter_is_refused(run, tiny_model):
    adapter = {"peft_config": LoraConfig(**{**LORA, "target_modules": ["k_proj"]})}
    trainer = make_trainer(GRPOExtTrainer, tiny_model, vowels, run, trainer_options=adapter, **SETTINGS["lora"])
    trainer._resumed_from = run / "checkpoint-2"
    with pytest.raises(ValueError, match=r"another model: .*k_proj.*differ"):
        trainer._restore()


def test_older_checkpoints_go_only_when_the_new_one_is_complete(tiny_model, tmp_path, monkeypatch):
    def seal(folder):
        if folder.name == "checkpoint-3":
            raise KeyboardInterrupt
        seal_checkpoint(folder)

    monkeypatch.setattr(checkpointed_trainer, "seal_checkpoint", seal)
    with pytest.raises(KeyboardInterrupt):
        make("lora", tiny_model, None, tmp_path, save_total_limit=1).train()
    assert complete_steps(tmp_path) == [2]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


KILLS = int(os.environ.get("KILLS", "4"))
ENDLESS = 1000


def train_and_be_killed(tiny_model, folder):
    torch.set_num_threads(1)
    started = folder.exists()
    trainer = make("lora", tiny_model, None, folder, **KILLED)
    trainer.train(resume_from_checkpoint=started)


# In one epoch: of a later one TRL's sampler gives a resumed run the prompts in another order
KILLED = {"max_steps": ENDLESS, "save_total_limit": 2, "lr_scheduler_type": "constant", "prompt_repeats": 1000}


def complete_steps(folder):
    complete = [path for path in folder.glob("checkpoint-*") if what_is_missing(path) is None]
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in complete)


def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(tiny_model, tmp_path):
    folder, rng = tmp_path / "killed", random.Random(0)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_checkpoints"])
    newest = torn = 0
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
        torn += len(list(folder.glob("checkpoint-*"))) - len(steps)
        assert steps and steps[-1] > newest
        newest = steps[-1]
    print(f"{KILLS} kills, {torn} torn checkpoints, the newest complete one at step {newest}")
    end = {**KILLED, "max_steps": newest + 2}
    resumed = make("lora", tiny_model, None, folder, **end)
    resumed.train(resume_from_checkpoint=True)
    expected = seen(resumed)
    # TRL seeds when a trainer is made
    whole = make("lora", tiny_model, None, tmp_path / "whole", **end)
    whole.train()
    assert_same_run(expected, seen(whole))
