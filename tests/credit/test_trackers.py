"""Real trackers, offline: they keep what the trainer has logged, and the report if they can show it."""

import json
import logging
import os
import shutil
import struct
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerState

from tests.support import distributed_worker
from tests.support.training import PROMPTS, fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtTrainer
from trl_grpo_ext.credit.page_of_run import PAGE_NAME
from trl_grpo_ext.credit.trackers import log_report


# Names that dashboards are built on: TRL's and this package's, of training and of evaluation
NAMES = {
    *("train/loss", "train/reward", "train/kl", "train/kl_loss", "train/policy_loss", "train/entropy"),
    *("train/rewards/steps/mean", "train/rewards/steps/step_mean", "train/rewards/steps/corr/outcome"),
    *("train/rewards/outcome/unjudged", "train/advantages/positive_share", "train/completions/mean_length"),
    *("eval/reward", "eval/rewards/steps/step_mean", "eval/advantages/positive_share", "eval/kl"),
}
# Of the whole training; some trackers keep them elsewhere
OF_THE_RUN = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def read_tensorboard(folder: Path) -> tuple[dict, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("runs/*/events*")
    events = EventAccumulator(str(file)).Reload()
    found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    return found, []


def read_trackio(folder: Path) -> tuple[dict, list[str]]:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    (run,) = SQLiteStorage.get_runs(folder.name)
    entries = SQLiteStorage.get_logs(folder.name, run)
    pages = [entry["credit_report"] for entry in entries if "credit_report" in entry]
    assert all(page["_type"] == "trackio.html" for page in pages)
    return by_step(entries), [(MEDIA_DIR / page["file_path"]).read_text(encoding="utf-8") for page in pages]


def read_wandb(folder: Path) -> tuple[dict, list[str]]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # Ends the run, and the process that writes, which else may not be done
    wandb.teardown()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    entries = []
    for data in leveldb_records(file.read_bytes()):
        items = Record.FromString(data).history.item
        entries.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    pages = [entry["credit_report/path"] for entry in entries if "credit_report/path" in entry]
    return by_step(entries), [(file.parent / "files" / page).read_text(encoding="utf-8") for page in pages]


def leveldb_records(data: bytes) -> list[bytes]:
    """The records of a W&B file: after 7 bytes, blocks of 32 KiB with parts of checksum, length, kind and content."""
    records = []
    record = b""
    place = 7
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part
        if kind in (1, 4):
            records.append(record)
            record = b""
    return records


def by_step(entries: list[dict]) -> dict:
    """Figures that transformers has logged, by its step."""
    logged = [entry for entry in entries if "train/global_step" in entry]
    return {(entry["train/global_step"], name): value for entry in logged for name, value in entry.items()}


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}


@pytest.fixture(params=READERS)
def tracker(request, tmp_path, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Else it goes on reading what later tests print, and logs its failures with their frames, which hold trainers
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield request.param
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def test_a_tracker_keeps_what_is_logged(tracker, tiny_model, tmp_path):
    rows = fixed_completions(distributed_worker.LENGTHS)
    trainer = make_trainer(
        GRPOExtTrainer,
        tiny_model,
        [distributed_worker.steps, distributed_worker.outcome],
        tmp_path,
        trainer_options={"rollout_func": rows, "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:3]})},
        supervision="process",
        beta=0.1,
        per_device_train_batch_size=12,
        per_device_eval_batch_size=12,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        log_credit=1,
        report_to=[tracker],
        project=tmp_path.name,
    )
    trainer.train()
    found, pages = READERS[tracker](tmp_path)
    history = [(entry["step"], name, value) for entry in trainer.state.log_history for name, value in entry.items()]
    expected = {
        (step, name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"): value
        for step, name, value in history
        if name not in {"step", *OF_THE_RUN}
    }
    assert {(step, name) for step in (1, 2) for name in NAMES if (name[:5] == "train" or step == 2)} <= set(expected)
    # TensorBoard holds float32
    assert {figure: found[figure] for figure in expected} == pytest.approx(expected, rel=1e-6)
    # The report as it is, once, with the curves of the whole run
    report = tmp_path / PAGE_NAME
    assert pages == ([] if tracker == "tensorboard" else [report.read_text(encoding="utf-8")])
    assert report.exists() == bool(pages) and all("Curves are the trainer" in page for page in pages)


@pytest.mark.parametrize("cause", ["nothing recorded", "no folder"])
def test_a_report_that_fails_is_a_warning_with_its_cause(tmp_path, caplog, cause):
    with caplog.at_level(logging.WARNING):
        log_report(tmp_path / ("" if cause == "nothing recorded" else "missing"), TrainerState(), ["wandb"])
    (record,) = caplog.records
    assert "is not logged: FileNotFoundError: " in record.getMessage()
    assert ("train with log_credit=2" in record.getMessage()) == (cause == "nothing recorded")
