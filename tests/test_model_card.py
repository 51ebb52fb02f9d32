"""The model card of a trained model: what it says of the run, what it cites, and that every saved model has it."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.support.training import fixed_completions, make_trainer
from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, StepRewards
from trl_grpo_ext.model_card import citations, training_section


def judge_steps(completion_ids, **columns):
    return [StepRewards([0, len(ids) - 1], [0.5, 1.0]) for ids in completion_ids]


def judge_answer(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def config(**fields) -> GRPOExtConfig:
    return GRPOExtConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", **fields)


def trained(model, folder, peft_config=None, **fields) -> GRPOExtTrainer:
    rows = fixed_completions([3, 5, 4, 6])
    trainer = make_trainer(
        GRPOExtTrainer,
        model,
        [judge_steps, judge_answer],
        folder,
        trainer_options={"rollout_func": rows, "peft_config": peft_config},
        max_steps=1,
        per_device_train_batch_size=4,
        supervision="process",
        gamma=[0.9, 1.0],
        reward_weights=[0.5, 2.0],
        beta=0.03,
        **fields,
    )
    trainer.train()
    return trainer


def rows(text: str) -> dict[str, str]:
    """The first two cells of every row of the text's tables."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|", text, re.M))


def test_the_section_names_what_shaped_the_rewards_and_the_kl():
    args = config(
        supervision="process",
        advantage_estimator="min",
        gamma=[0.9, 1.0],
        gamma_unit="step",
        reward_transforms=["clip:0.4", "none"],
        outcome_gate=["answer|1", "none"],
        beta=0.03,
        kl_estimator="exact",
        kl_direction="forward",
        kl_reduction="token_mean",
        sync_ref_model=True,
        ref_model_sync_steps=7,
        ref_model_mixup_alpha=0.25,
        multi_objective_aggregation="normalize_then_sum",
        scale_rewards="batch",
    )
    section = training_section(args, ["steps", "answer|1"], ["0.5", "linear:2:0"])
    said = rows(section)
    assert "`process`" in said["supervision"] and said["advantage estimator"].startswith("`min`: returns of the soft")
    assert said["discount"].endswith("each step")
    assert said["sources combined"] == "`normalize_then_sum`, scaled by `batch`"
    assert said["KL"] == "`exact`, forward, over the whole vocabulary; `beta` = 0.03, reduced by `token_mean`"
    assert "every 7 steps by 0.25" in said["KL reference"]
    assert (
        "| `steps` | 0.5 | 0.9 | clip:0.4 | answer&#124;1 |\n| `answer&#124;1` | linear:2:0 | 1 | none | none |\n"
        in section
    )
    for package in ("trl_grpo_ext", "trl", "transformers", "peft", "accelerate", "torch"):
        assert re.search(rf"\b{package} \d+\.\d+", said["versions"])


def test_outcome_supervision_without_a_kl_names_neither_discount_nor_reference():
    section = training_section(config(), ["answer"], ["1"])
    assert rows(section).keys() & {"advantage estimator", "discount", "KL reference"} == set()
    assert rows(section)["KL"].startswith("none")
    assert "| `answer` | 1 | none | none | none |" in section
    assert "bibtex" not in section


@pytest.mark.parametrize(
    ("fields", "papers"),
    [
        ({"advantage_estimator": "position"}, []),
        ({"advantage_estimator": "pooled"}, []),
        ({"advantage_estimator": "step"}, ["github.com/opendilab/LightRFT"]),
        ({"advantage_estimator": "min"}, ["2504.15275"]),
        # Where it does nothing
        ({"advantage_estimator": "min", "supervision": "outcome"}, []),
        ({"importance_sampling_level": "sequence_token"}, ["2507.18071"]),
        ({"reward_transforms": ["delta"]}, ["2410.15115"]),
        ({"reward_transforms": ["center"]}, []),
        ({"beta": 0.1, "kl_estimator": "exact"}, ["2504.10637", "2506.09477"]),
        ({"beta": 0.1, "kl_estimator": "k2"}, ["joschu.net/blog/kl-approx"]),
        # TRL's estimate, which TRL's card does not cite
        ({"beta": 0.1}, ["joschu.net/blog/kl-approx"]),
    ],
    ids=str,
)
def test_what_is_used_is_cited(fields, papers):
    """DeepSeekMath, and with it "pooled", is in TRL's part of every card."""
    cited = citations(config(**({"supervision": "process"} | fields)))
    assert [paper for paper, citation in zip(papers, cited, strict=True) if paper in citation.bibtex] == papers
    assert all(citation.bibtex.count("{") == citation.bibtex.count("}") for citation in cited)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_a_model_saved_without_checkpoints_has_the_card(tiny_model, tmp_path, peft_config):
    trainer = trained(tiny_model, tmp_path / "run", peft_config, save_strategy="no", kl_estimator="exact")
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "run", tmp_path / "elsewhere"):
        card = ModelCard.load(folder / "README.md")
        # TRL's part, ours, once, and PEFT's metadata
        assert "# Model Card for run" in card.text and "Cite GRPO as" in card.text
        assert card.text.count("## Rewards, advantages and KL") == 1
        assert "| `judge_answer` | 2 | 1 |" in card.text and "2504.10637" in card.text
        assert {"grpo", "trl-grpo-ext"} <= set(card.data.tags)
        assert card.data.library_name == ("peft" if peft_config else "transformers")
    assert Path(trainer.args.output_dir) == tmp_path / "run"


def test_a_checkpoint_and_the_run_that_wrote_it_have_the_card(tiny_model, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trained(tiny_model, tmp_path / "run", lora, save_strategy="steps", save_steps=1)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        text = (folder / "README.md").read_text()
        assert "# Model Card for run" in text
        assert text.count("## Rewards, advantages and KL") == 1


def test_only_the_main_process_writes_a_card(tiny_model, tmp_path, monkeypatch):
    trainer = trained(tiny_model, tmp_path, save_strategy="no")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()
