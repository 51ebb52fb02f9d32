"""Which checkpoint is resumed, and which are deleted: transformers' rules, with incomplete and foreign ones unseen."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints as transformers_rotate

from tests.checkpoints.runs import complete_steps, make, steps_of
from trl_grpo_ext.checkpoints import folders
from trl_grpo_ext.checkpoints import trainer as checkpointed_trainer
from trl_grpo_ext.checkpoints.folders import find_checkpoint, newest_complete, rotate_checkpoints
from trl_grpo_ext.checkpoints.manifest import MANIFEST_NAME, mark_complete, mark_incomplete, read_manifest
from trl_grpo_ext.checkpoints.reference import REFERENCE_NAME


def write(folder, manifest, time=0):
    """A checkpoint's folder, written at a time in seconds; a foreign one has no manifest."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if manifest == "complete":
        mark_complete(folder)
    elif manifest == "incomplete":
        mark_incomplete(folder)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time, time))


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_incomplete_checkpoints_are_passed_over_by_name(run, caplog):
    mark_incomplete(run / "checkpoint-2")
    assert find_checkpoint(True, run) == run / "checkpoint-1"
    (warning,) = caplog.messages
    assert "Passing over the incomplete checkpoint" in warning and "checkpoint-2 (it was not complete" in warning
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint: it was not complete when"):
        find_checkpoint(run / "checkpoint-2", run)
    with pytest.raises(ValueError, match="checkpoint-3 is not a complete checkpoint: there is no such folder"):
        find_checkpoint(str(run / "checkpoint-3"), run)


def test_without_a_complete_checkpoint_the_error_names_the_incomplete_ones(run, tiny_model):
    (run / "checkpoint-1" / MANIFEST_NAME).write_text("")
    mark_incomplete(run / "checkpoint-2")
    trainer = make("lora", tiny_model, run)
    with pytest.raises(
        ValueError, match=r"incomplete are .*checkpoint-2 \(it was not complete.*checkpoint-1 \(checkpoint.json cannot"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint in .*nowhere to resume from: it holds no checkpoint"):
        newest_complete(run / "nowhere")


def test_checkpoints_of_trl_are_taken_unless_their_last_file_is_missing(run):
    checkpoint = run / "checkpoint-2"
    (checkpoint / MANIFEST_NAME).unlink()
    assert find_checkpoint(True, run) == checkpoint
    (checkpoint / "trainer_state.json").write_text('{"epoch": 0.')
    assert find_checkpoint(True, run) == run / "checkpoint-1"
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint: trainer_state.json cannot be"):
        find_checkpoint(checkpoint, run)
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="it has neither checkpoint.json nor trainer_state.json"):
        find_checkpoint(checkpoint, run)


def test_checkpoints_are_ordered_by_step(run):
    (run / "checkpoint-2").rename(run / "checkpoint-10")
    (run / "checkpoint-1").rename(run / "checkpoint-9")
    (run / "checkpoint-best").mkdir()
    assert newest_complete(run) == run / "checkpoint-10"


# ---------------------------------------------------------------------------------------------------------------------
# Deleting


# When each checkpoint was written, in units of two seconds, and what it is
CHECKPOINTS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["complete", "complete", "incomplete", "foreign"])),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, max_examples=40)
@given(CHECKPOINTS, st.sampled_from([None, 0, 1, 2, 3, 5]), st.integers(0, 8))
def test_rotation_is_transformers_where_incomplete_and_foreign_folders_are_unseen(checkpoints, limit, best):
    newest = len(checkpoints) + 1
    checkpoints = dict(enumerate([*checkpoints, (50, "complete")], 1))
    best = best if checkpoints.get(best, (0, ""))[1] == "complete" else None
    with TemporaryDirectory() as ours, TemporaryDirectory() as theirs:
        for step, (time, kind) in checkpoints.items():
            write(Path(ours, f"checkpoint-{step}"), kind, 2 * time)
            if kind == "complete":
                write(Path(theirs, f"checkpoint-{step}"), kind, 2 * time)
        best_name = f"checkpoint-{best}"
        rotate_checkpoints(
            Path(ours), limit, Path(ours, f"checkpoint-{newest}"), Path(ours, best_name) if best else None
        )
        transformers_rotate(theirs, limit, str(Path(theirs, best_name)) if best else None, use_mtime=True)
        left = steps_of(Path(ours))
        expected = steps_of(Path(theirs))
    foreign = [step for step, (_, kind) in checkpoints.items() if kind == "foreign"]
    # All of them are older than the newest
    incomplete = [step for step, (_, kind) in checkpoints.items() if kind == "incomplete" and not limit]
    assert left == sorted([*expected, *foreign, *incomplete])


def test_an_incomplete_checkpoint_that_is_younger_than_the_newest_complete_one_stays(tmp_path):
    """Another run may be writing it."""
    write(tmp_path / "checkpoint-1", "incomplete", 10)
    write(tmp_path / "checkpoint-2", "complete", 20)
    write(tmp_path / "checkpoint-3", "incomplete", 30)
    # What is edited in a folder does not make it younger
    os.utime(tmp_path / "checkpoint-1", (40, 40))
    rotate_checkpoints(tmp_path, 1, tmp_path / "checkpoint-2", None)
    assert steps_of(tmp_path) == [2, 3]


def test_folders_of_others_are_left_alone_and_named_once(tmp_path, caplog):
    write(tmp_path / "checkpoint-1", "complete")
    write(tmp_path / "checkpoint-700", "foreign")
    write(tmp_path / "checkpoint-800", "complete")
    (tmp_path / "checkpoint-800" / MANIFEST_NAME).write_text("damaged")
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 3):
        write(tmp_path / f"checkpoint-{step}", "complete")
        rotate_checkpoints(tmp_path, 1, tmp_path / f"checkpoint-{step}", None)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{name}" for name in (3, 700, 800, "best")}
    assert sum("leaves checkpoint-700, checkpoint-800 in" in message for message in caplog.messages) == 1


def test_a_kill_while_a_checkpoint_is_deleted_leaves_an_incomplete_one(run, monkeypatch):
    unlink = Path.unlink
    deleted = []

    def killed_after_two(self, missing_ok=False):
        if len(deleted) == 2:
            raise KeyboardInterrupt
        deleted.append(self)
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed_after_two)
        with pytest.raises(KeyboardInterrupt):
            rotate_checkpoints(run, 1, run / "checkpoint-2", None)
    assert len(deleted) == 2 and read_manifest(run / "checkpoint-1").complete is False
    mark_complete(run / "checkpoint-2")
    rotate_checkpoints(run, 1, run / "checkpoint-2", None)
    assert steps_of(run) == [2]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(run, monkeypatch, caplog):
    def busy(path):
        raise OSError("device or resource busy")

    monkeypatch.setattr(folders.shutil, "rmtree", busy)
    rotate_checkpoints(run, 1, run / "checkpoint-2", None)
    assert any("checkpoint-1 could not be deleted: device or resource busy" in text for text in caplog.messages)
    assert complete_steps(run) == [2]


# ---------------------------------------------------------------------------------------------------------------------
# In a run


class EditGenerationConfig(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "temperature": 0.7}))


def test_checkpoints_that_a_callback_edits_are_kept_and_resumed(tiny_model, tmp_path):
    options = {"save_total_limit": 5, "num_iterations": 1, "supervision": "outcome"}
    make("full, one update", tiny_model, tmp_path, callbacks=[EditGenerationConfig()], max_steps=4, **options).train()
    assert complete_steps(tmp_path) == [1, 2, 3, 4]
    resumed = make("full, one update", tiny_model, tmp_path, max_steps=5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5 and complete_steps(tmp_path) == [1, 2, 3, 4, 5]


def test_edited_checkpoints_and_a_foreign_model_outlive_the_next_save(run, tiny_model, caplog):
    (run / "checkpoint-1" / "optimizer.pt").unlink()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    for name in ("tokenizer_config.json", "trainer_state.json"):
        path = run / "checkpoint-2" / name
        path.write_text(json.dumps(json.loads(path.read_bytes()), indent=7))
    (run / "checkpoint-700").mkdir()
    (run / "checkpoint-700" / "model.safetensors").touch()
    trainer = make("lora", tiny_model, run, max_steps=3, save_total_limit=10)
    trainer.train(resume_from_checkpoint=True)
    assert complete_steps(run) == [1, 2, 3] and steps_of(run) == [1, 2, 3, 700]
    (warning,) = [message for message in caplog.messages if "edited since it was saved" in message]
    assert "optimizer.pt is missing; tokenizer_config.json has" in warning and "trainer_state.json has" in warning


def test_resumed_after_an_incomplete_checkpoint_the_complete_one_stays_until_there_is_another(run, tiny_model):
    shutil.rmtree(run / "checkpoint-2")
    mark_incomplete(run / "checkpoint-9")
    make("lora", tiny_model, run, save_total_limit=1, max_steps=3).train(resume_from_checkpoint=True)
    assert steps_of(run) == complete_steps(run) == [3]


def test_older_checkpoints_go_only_when_the_new_one_is_complete(tiny_model, tmp_path, monkeypatch):
    def killed_at_3(folder):
        if folder.name == "checkpoint-3":
            raise KeyboardInterrupt
        mark_complete(folder)

    monkeypatch.setattr(checkpointed_trainer, "mark_complete", killed_at_3)
    with pytest.raises(KeyboardInterrupt):
        make("lora", tiny_model, tmp_path, save_total_limit=1).train()
    assert complete_steps(tmp_path) == [2]
    assert steps_of(tmp_path) == [2, 3]


def test_a_checkpoint_that_is_written_anew_keeps_nothing_of_the_one_before(run, tiny_model):
    assert (run / "checkpoint-2" / "batch_0.pt").is_file()
    make("lora", tiny_model, run, max_steps=2, num_iterations=1, sync_ref_model=False).train()
    assert complete_steps(run) == [1, 2]
    assert not (run / "checkpoint-2" / "batch_0.pt").exists()
    assert not (run / "checkpoint-2" / REFERENCE_NAME).exists()


class FirstIsBest(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        state.best_global_step = 1


def test_at_the_end_only_the_best_checkpoint_stays_and_foreign_folders(tiny_model, tmp_path):
    """At `save_total_limit=1` transformers deletes all folders but the best one's when a run ends."""
    write(tmp_path / "checkpoint-700", "foreign")
    trainer = make("lora", tiny_model, tmp_path, callbacks=[FirstIsBest()], save_total_limit=1, max_steps=3)
    trainer.train()
    assert steps_of(tmp_path) == [1, 700]
    assert trainer.args.save_total_limit == 1
    arguments = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 1
