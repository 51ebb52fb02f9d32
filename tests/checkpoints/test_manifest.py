"""A checkpoint is complete if its manifest says so, whatever has been edited in it since."""

import pytest

from trl_grpo_ext.checkpoints.folders import find_checkpoint, newest_complete
from trl_grpo_ext.checkpoints.manifest import (
    MANIFEST_NAME,
    SENTINEL_NAME,
    incompleteness,
    mark_complete,
    mark_incomplete,
    missing_required,
    read_manifest,
)
from trl_grpo_ext.checkpoints.reference import REFERENCE_NAME


REQUIRED = {"adapter_model.safetensors", "trainer_state.json"}
OPTIONAL = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "batch_0.pt", "tokenizer_config.json", REFERENCE_NAME}


def test_a_complete_checkpoint_with_a_file_missing_or_edited_is_resumed_with_one_warning_unless_nothing_can_be(
    run, caplog
):
    checkpoint = run / "checkpoint-2"
    files = {
        path.relative_to(checkpoint).as_posix(): path
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    assert files.keys() > REQUIRED | OPTIONAL
    for name, path in files.items():
        content = path.read_bytes()
        caplog.clear()
        path.write_bytes(content[:-1])
        assert incompleteness(checkpoint) is None
        assert find_checkpoint(True, run) == checkpoint
        (warning,) = caplog.messages
        assert f"edited since it was saved: {name} has {len(content) - 1} bytes instead of {len(content)}." in warning
        caplog.clear()
        path.unlink()
        for resume in (True, str(checkpoint)):
            if name in REQUIRED:
                with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed without {name}, which"):
                    find_checkpoint(resume, run)
            else:
                assert find_checkpoint(resume, run) == checkpoint
        assert [f"edited since it was saved: {name} is missing." in message for message in caplog.messages] == (
            [] if name in REQUIRED else [True, True]
        )
        path.write_bytes(content)
    caplog.clear()
    assert find_checkpoint(True, run) == checkpoint
    assert not caplog.messages


@pytest.mark.parametrize(
    ("files", "required"),
    [
        (["model.safetensors", "config.json", "training_args.bin"], ["model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], [...]),
        (["adapter_model.safetensors", "ref/adapter_model.safetensors"], ["adapter_model.safetensors"]),
        (["ref/adapter_model.safetensors", "ref/adapter_config.json"], ["ref/adapter_model.safetensors"]),
        (["model.safetensors", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"], [1]),
        (["model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"], [1]),
        (["model.safetensors", "global_step2/mp_rank_00_model_states.pt", "global_step2/zero_optim_states.pt"], [1]),
        (["reference/parameters.safetensors", "batch_0.pt"], []),
    ],
)
def test_transformers_cannot_resume_without_the_weights_that_it_would_load(tmp_path, files, required):
    required = files if required == [...] else [files[name] if isinstance(name, int) else name for name in required]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    mark_complete(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.sizes == dict.fromkeys(sorted(files), 1)
    for name in files:
        (tmp_path / name).unlink()
        assert missing_required(tmp_path, manifest) == ([name] if name in required else [])
        (tmp_path / name).write_text("x")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"complete": 1'])
def test_a_manifest_that_is_damaged_says_nothing(run, content):
    (run / "checkpoint-2" / MANIFEST_NAME).write_text(content)
    assert read_manifest(run / "checkpoint-2") is None
    assert incompleteness(run / "checkpoint-2") == f"{MANIFEST_NAME} cannot be read"
    assert newest_complete(run) == run / "checkpoint-1"


@pytest.mark.parametrize("content", ['{"complete": false}', '{"complete": null, "files": {}}', '{"complete": "no"}'])
def test_only_true_is_complete(run, content):
    (run / "checkpoint-2" / MANIFEST_NAME).write_text(content)
    assert "not complete" in incompleteness(run / "checkpoint-2")


def test_what_transformers_marks_as_incomplete_while_it_is_preempted_is(run):
    (run / "checkpoint-2" / SENTINEL_NAME).touch()
    assert newest_complete(run) == run / "checkpoint-1"
    mark_complete(run / "checkpoint-2")
    (run / "checkpoint-2" / SENTINEL_NAME).unlink()
    assert newest_complete(run) == run / "checkpoint-2"
    assert SENTINEL_NAME not in read_manifest(run / "checkpoint-2").sizes


def test_the_manifest_is_replaced_at_once(tmp_path, monkeypatch):
    """A process that is killed while it writes leaves the old one."""
    mark_incomplete(tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            mark_complete(tmp_path)
    assert read_manifest(tmp_path).complete is False
