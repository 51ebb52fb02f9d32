"""The log of credit holds what was trained on: through real trainers, real tokenizers and killed writers."""

import itertools
import multiprocessing
import shutil

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from tests.credit.runs import EVERY_FORM, credit_of
from tests.support import distributed_worker
from tests.support.tokenizers import completions, load_tokenizer
from tests.support.training import (
    FixedCompletions,
    RecordingExtTrainer,
    dense_logits,
    fixed_completions,
    make_trainer,
    moved_policy,
)
from trl_grpo_ext import GRPOExtConfig, StepRewards
from trl_grpo_ext.credit.columns import COLUMNS
from trl_grpo_ext.credit.embed import Vocabulary, pack_group, unpack_group
from trl_grpo_ext.credit.log import credit_file, token_texts, write_rows
from trl_grpo_ext.credit.page_of_run import page_of_run
from trl_grpo_ext.credit.read import read_credit
from trl_grpo_ext.steps.alignment import align_tokens


def filled(values):
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


@pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: "-".join(map(str, form.values())))
def test_sums_are_the_advantages_that_were_trained_on(form, tiny_model, tmp_path):
    config = {"reward_weights": [0.8, 1.5], "reward_transforms": ["center", "none"]} | form
    trainer, (rows,) = credit_of(tiny_model, tmp_path, **config)
    (batch,) = trainer.batches
    assert [(row["group"], row["completion"]) for row in rows] == [(n // 4, n % 4) for n in range(8)]
    largest = 0.0
    for n, row in enumerate(rows):
        length = len(row["token_ids"])
        assert row["explained"] and list(row) == list(COLUMNS)
        trained = batch["advantages"][n].double()
        trained = trained[:length] if trained.ndim else trained.expand(length)
        assert torch.equal(filled(row["advantages"]).float(), trained.float())
        summed = row["offset"] + sum(filled(source["share"]) for source in row["sources"])
        torch.testing.assert_close(summed, trained, rtol=0, atol=1e-5)
        largest = max(largest, trained.abs().max().item())
    assert largest > 0.1


def test_columns_hold_what_the_sources_returned_and_the_loss_saw(tiny_model, tmp_path):
    """Two updates on one batch: log-probs, entropy and KL are those of the first."""
    rows = FixedCompletions([[5, 6], [5, 6]], [[7, 8, 9, 2], [10, 11, 2]])

    def judge(completion_ids, **columns):
        return [StepRewards([1, 3], [0.25, None]), None]

    def answer(row, **columns):
        return [[1.0, 0.0][number] for number in row]

    policy = moved_policy(tiny_model)
    before = [torch.log_softmax(dense_logits(policy, rows, row, 0.9), -1) for row in (0, 1)]
    trainer, (found,) = credit_of(
        policy,
        tmp_path,
        [judge, answer],
        rows,
        reward_transforms=["center", "none"],
        outcome_gate=["none", "judge"],
        num_generations=2,
        num_iterations=2,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.1,
        temperature=0.9,
        beta=0.1,
        kl_estimator="k2",
        log_credit=9,
    )
    for n, row in enumerate(found):
        assert row["step"] == 1 and row["mode"] == "train" and row["token_ids"] == rows.completion_ids[n]
        assert row["prompt"] == trainer._tokenizer.decode([5, 6]) and row["tokens"][-1] == "<eos>"
        logps_TV, ids = before[n], torch.tensor(rows.completion_ids[n])
        expected = logps_TV[torch.arange(len(ids)), ids].detach().double()
        torch.testing.assert_close(filled(row["trainer_logprobs"]), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(filled(row["old_logprobs"]), expected, rtol=0, atol=1e-5)
        entropy = -(logps_TV.exp() * logps_TV).sum(-1).detach().double()
        torch.testing.assert_close(filled(row["entropy"]), entropy, rtol=0, atol=1e-4)
        k2 = (filled(row["trainer_logprobs"]) - filled(row["ref_logprobs"])) ** 2 / 2
        torch.testing.assert_close(filled(row["kl"]), k2, rtol=1e-3, atol=1e-6)
        assert row["inference_logprobs"] is None and not row["truncated"]
    steps, outcome = found[0]["sources"]
    assert steps | {"is_steps": True, "ends": [1, 3], "returned": [0.25, None], "transformed": [-0.5, None]} == steps
    assert steps["reward"] == [None, -0.5, None, None] and found[0]["step_ends"] == [1, 3]
    assert outcome["gate"] == "judge" and outcome["returned"] == [1.0] and outcome["ends"] == [3]
    # The gate's reward is negative
    assert outcome["withheld"] and outcome["reward"] == [None] * 4
    assert found[1]["sources"][0]["returned"] == [] and not found[1]["sources"][0]["is_steps"]


def test_old_log_probs_are_the_tokens_own_with_a_sequences_ratio_too(tiny_model, tmp_path):
    """Two updates on a batch, each of which sees other rows for the first time."""
    rows = fixed_completions([3, 5, 4, 6])
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    _, (found,) = credit_of(
        tiny_model,
        tmp_path,
        rows=rows,
        num_generations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        max_steps=2,
        learning_rate=0.5,
        importance_sampling_level="sequence_token",
    )
    moved = []
    for n, row in enumerate(found):
        logps_TV = torch.log_softmax(dense_logits(before, rows, n, 1.0), -1).detach()
        expected = logps_TV[torch.arange(len(logps_TV)), torch.tensor(rows.completion_ids[n])].double()
        torch.testing.assert_close(filled(row["old_logprobs"]), expected, rtol=0, atol=1e-5)
        moved.append((filled(row["trainer_logprobs"]) - expected).abs().max().item() > 1e-3)
    assert sorted(moved) == [False, False, True, True]


def test_evaluation_micro_batches_and_the_end_of_training_are_recorded_once_each(tiny_model, tmp_path):
    trainer, steps = credit_of(
        tiny_model,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=3,
        max_steps=4,
        logging_steps=4,
        per_device_eval_batch_size=4,
        log_credit=9,
    )
    # The batch of steps 4 to 6, of which one micro-batch was trained on
    (rows,) = steps
    assert {row["step"] for row in rows} == {4} and len(rows) == 12
    assert sum(row["trainer_logprobs"] is not None for row in rows) == 4
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    (evaluated,) = [step for step in read_credit(tmp_path).steps if step.mode == "eval"]
    assert [row["group"] for row in evaluated.rows()] == [0] * 4
    assert all(row["kl"] is None and row["entropy"] is not None for row in evaluated.rows())


@pytest.mark.parametrize("gamma_unit", ["token", "turn"])
@pytest.mark.parametrize("estimator", ["position", "pooled"])
def test_tool_output_and_truncated_completions_carry_nothing(estimator, gamma_unit, tiny_model, tmp_path):
    """The second token is a tool's; the last completion has no end-of-sequence token and is masked."""
    rows = FixedCompletions(
        [[5, 6]] * 4,
        [[7, 8, 9, 2], [10, 11, 12, 2], [13, 2], [14] * 16],
        env_mask=[[1, 0, 1, 1], [1, 0, 1, 1], [1, 1], [1] * 16],
    )

    def judge(completion_ids, **columns):
        return [[0.1 * token for token in range(len(ids))] for ids in completion_ids]

    def answer(row, **columns):
        return [float(number) for number in row]

    forms = {"advantage_estimator": estimator, "gamma_unit": gamma_unit, "gamma": 0.5}
    trainer, (found,) = credit_of(
        tiny_model, tmp_path, [judge, answer], rows, mask_truncated_completions=True, **forms
    )
    (batch,) = trainer.batches
    for n, row in enumerate(found):
        mask = torch.tensor(row["loss_mask"])
        assert mask.tolist() == (rows.env_mask[n] if n < 3 else [0] * 16)
        summed = row["offset"] + sum(filled(source["share"]) for source in row["sources"])
        trained = batch["advantages"][n, : len(mask)].double()
        torch.testing.assert_close(summed[mask], trained[mask], rtol=0, atol=1e-5)
        assert summed[~mask].isnan().all()
        steps, outcome = row["sources"]
        assert len(steps["returned"]) == len(mask) and outcome["returned"] == [float(n)]
        assert [value is not None for value in steps["reward"]] == mask.tolist()
        assert sum(value is not None for value in outcome["reward"]) == (n < 3)
    assert [row["truncated"] for row in found] == [False, False, False, True]
    page, _ = page_of_run(tmp_path)
    assert "Truncated completions" in page
    # What the page computes by itself is right with tools, too
    (step,) = read_credit(tmp_path).steps
    packed, _ = unpack_group(pack_group(found, step.settings, Vocabulary()))
    assert all(row["advantages"] is None for row in packed)


class Bounded(RecordingExtTrainer):
    """The README's example of a subclass."""

    def compute_advantages(self, batch):
        return super().compute_advantages(batch).clamp(-0.5, 0.5)


def test_of_advantages_that_a_subclass_changes_no_sum_is_shown(tiny_model, tmp_path):
    _, (rows,) = credit_of(tiny_model, tmp_path, trainer_class=Bounded)
    clamped = [row for row in rows if max(map(abs, row["advantages"])) >= 0.5]
    assert clamped and all(row["explained"] != (row in clamped) for row in rows)
    for row in clamped:
        assert row["offset"] is None and all(source["return"] is source["share"] is None for source in row["sources"])
        assert any(source["reward"] for source in row["sources"])


def test_nothing_is_written_by_default_and_bad_values_are_refused(tiny_model, tmp_path):
    make_trainer(
        RecordingExtTrainer,
        tiny_model,
        [distributed_worker.outcome],
        tmp_path,
        trainer_options={"rollout_func": fixed_completions(distributed_worker.LENGTHS)},
        per_device_train_batch_size=12,
        max_steps=1,
    ).train()
    assert not (tmp_path / "credit").exists()
    common = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match="log_credit must be an integer, 0 or larger; got -1"):
        GRPOExtConfig(**common, log_credit=-1)
    with pytest.raises(ValueError, match="logging_strategy"):
        GRPOExtConfig(**common, log_credit=1, logging_strategy="epoch")


@pytest.mark.xdist_group("tokenizers")
# Bytes in characters of their own, and bytes that fall back
@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_pieces_join_to_the_completion(name):
    tokenizer = load_tokenizer(name)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(ids=completions(name))
    def check(ids):
        pieces = token_texts(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == align_tokens(tokenizer, ids).text
        # What parquet takes, and a page shows
        "".join(pieces).encode()

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_for_ever(folder, rows):
    for step in itertools.count(2):
        write_rows(credit_file(folder, "train", step), rows, {})


def test_a_killed_writer_and_foreign_files_do_not_choke_the_reader(tiny_model, tmp_path):
    _, (rows,) = credit_of(tiny_model, tmp_path)
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path, rows * 40))
    writer.start()
    folder = tmp_path / "credit"
    while not credit_file(tmp_path, "train", 3).exists():
        assert writer.is_alive()
    writer.kill()
    writer.join()
    log = read_credit(tmp_path)
    assert log.passed_over == {} and len(log.steps) >= 3
    assert all(len(step.rows()) == 320 for step in log.steps[1:])

    whole = (folder / "train_00000002.parquet").read_bytes()
    (folder / "train_00000100.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "train_00000101.parquet").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    parquet.write_table(pyarrow.table({"step": [1]}), folder / "train_00000102.parquet")
    found = read_credit(tmp_path)
    assert [step.step for step in found.steps] == [step.step for step in log.steps]
    assert set(found.passed_over) == {f"train_0000010{last}.parquet" for last in (0, 1, 2)}


def test_steps_of_an_earlier_run_that_got_further_are_passed_over(tiny_model, tmp_path):
    _, (rows,) = credit_of(tiny_model, tmp_path)
    folder = tmp_path / "credit"
    shutil.copy(folder / "train_00000001.parquet", folder / "train_00000007.parquet")
    write_rows(folder / "train_00000005.parquet", rows, {})
    log = read_credit(tmp_path)
    assert [step.step for step in log.steps] == [1, 5]
    assert list(log.passed_over) == ["train_00000007.parquet"]


def test_a_folder_without_a_log_says_what_to_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="log_credit=2"):
        read_credit(tmp_path)
