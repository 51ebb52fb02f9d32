"""Reward models in `reward_funcs`: opened by their bare ids, prepared, mixed with functions, placed on tokens."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

from tests.support.tiny_models import save_tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, RecordingExtTrainer, fixed_completions, make_trainer, scored_batch
from trl_grpo_ext import GRPOExtTrainer, OutcomeRewardModel, ProcessRewardModel, step_reward
from trl_grpo_ext.reward_models import checkpoint, presets, progress
from trl_grpo_ext.reward_models import opening as opening_module
from trl_grpo_ext.reward_models.opening import load_reward_model, open_reward_model, open_reward_models
from trl_grpo_ext.reward_models.remote import transport
from trl_grpo_ext.reward_models.remote.client import RemoteOutcomeRewardModel
from trl_grpo_ext.steps.segmentation import Segmentation


@pytest.fixture(scope="module")
def prm_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("prm"), LlamaForTokenClassification, LlamaConfig, num_labels=2)


def completions_in_lines():
    """Eight completions of characters; every fifth one is a newline."""
    rows = fixed_completions([14, 9, 12, 7, 15, 6, 11, 13], vocabulary=40)
    newline = tiny_tokenizer().convert_tokens_to_ids("\n")
    for ids in rows.completion_ids:
        ids[4:-1:5] = [newline] * len(ids[4:-1:5])
    return rows


def test_a_known_process_model_is_opened_by_its_id_and_mixed_with_a_function(
    tiny_model, prm_folder, tmp_path, monkeypatch
):
    rows = completions_in_lines()
    returned = []
    call = ProcessRewardModel.__call__

    def recording(self, *args, **columns):
        returned.append(call(self, *args, **columns))
        return returned[-1]

    monkeypatch.setattr(ProcessRewardModel, "__call__", recording)

    def long_enough(completion_ids, **columns):
        return [float(len(ids) > 10) for ids in completion_ids]

    trainer = make_trainer(
        RecordingExtTrainer,
        tiny_model,
        [prm_folder, long_enough],
        tmp_path,
        trainer_options={"rollout_func": rows},
        supervision="process",
        reward_weights=[1.0, 0.5],
        reward_batch_tokens=64,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    model = trainer.reward_funcs[0]
    assert isinstance(model, ProcessRewardModel) and model.trainer_batch_tokens == 64
    model.segmentation = Segmentation(by="newline")
    trainer.train()

    tokenizer, alone = tiny_tokenizer(), ProcessRewardModel.from_pretrained(prm_folder)
    for ids, rewards in zip(rows.completion_ids, returned[0], strict=True):
        steps = [line.strip() for line in tokenizer.decode(ids[:-1]).split("\n") if line.strip()]
        assert len(rewards.ends) == len(steps)
        # Newlines end steps, and the token before the end of sequence does
        assert all(ids[end] == tokenizer.convert_tokens_to_ids("\n") for end in rewards.ends[:-1])
        assert rewards.ends[-1] == len(ids) - 2
        by_prompt = alone.score_steps(PROMPTS, [steps] * len(PROMPTS))
        assert any(values == pytest.approx(rewards.values, abs=1e-5) for values in by_prompt)
    entry = trainer.state.log_history[0]
    name = prm_folder.rstrip("/").split("/")[-1]
    assert entry[f"rewards/{name}/unjudged"] == 0
    assert entry[f"rewards/{name}/steps"] > 1
    assert trainer.batches[0]["advantages"].ndim == 2


def screen(printed):
    """What is left in a terminal: tqdm goes to the beginning of the line, a line down, or a line up."""
    lines = [""]
    row = 0
    column = 0
    for part in re.split(r"(\r|\n|\x1b\[A)", printed):
        if part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return "\n".join(lines)


@pytest.mark.parametrize("disabled", [False, True], ids=["shown", "disable_tqdm"])
def test_scoring_that_takes_long_has_a_bar_for_each_model_that_leaves_nothing(
    tiny_model, prm_folder, tmp_path, monkeypatch, capsys, disabled
):
    """Of a local process model, a sequence classifier and a server, of which the last scores in another thread."""
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0.0)

    async def answer(self, payload, before=None):
        return {"rewards": [float(len(query)) for query in payload["query"]]}

    monkeypatch.setattr(transport.Session, "post", answer)
    classifier = LlamaForSequenceClassification.from_pretrained(
        save_tiny_model(tmp_path / "classifier", LlamaForSequenceClassification, LlamaConfig, num_labels=1)
    )
    make_trainer(
        GRPOExtTrainer,
        tiny_model,
        [prm_folder, classifier, RemoteOutcomeRewardModel("http://127.0.0.1:1", name="server")],
        tmp_path,
        trainer_options={"rollout_func": completions_in_lines()},
        per_device_train_batch_size=8,
        max_steps=1,
        reward_batch_tokens=64,
        disable_tqdm=disabled,
    ).train()
    printed = capsys.readouterr().err
    for bar in (prm_folder, "reward model", "server"):
        assert (f"{bar}: " in printed) != disabled
        assert f"{bar}: " not in screen(printed)
    assert ("/8 [" in printed) != disabled


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<sep>{{ m['content'] }}{% endfor %}"
    return tokenizer


def test_an_outcome_model_is_a_source(tiny_model, tmp_path):
    folder = save_tiny_model(tmp_path / "orm", LlamaForSequenceClassification, LlamaConfig, num_labels=1)
    with pytest.raises(ValueError, match="needs a chat template, and the tokenizer '.*orm' has none"):
        OutcomeRewardModel.from_pretrained(folder)
    model = OutcomeRewardModel.from_pretrained(folder, tokenizer=chat_tokenizer())
    trainer = make_trainer(GRPOExtTrainer, tiny_model, [model], tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/orm/std"] > 0


def test_options_that_a_classifier_of_trl_does_not_take_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(opening_module.logger, "warning_once", said.append)
    folder = save_tiny_model(tmp_path / "orm", LlamaForSequenceClassification, LlamaConfig, num_labels=1)
    assert open_reward_models([folder], {"dtype": "float32"}) == [folder] and said == []
    assert open_reward_models([folder], {"problem": {"column": "q"}, "max_length": 9, "dtype": "float32"}) == [folder]
    (message,) = said
    assert f"'{folder}' is a sequence classifier" in message and "It is without max_length, problem;" in message


def test_a_classifier_that_is_given_a_preset_is_not_left_to_trl(tmp_path):
    folder = save_tiny_model(tmp_path / "orm", LlamaForSequenceClassification, LlamaConfig, num_labels=1)
    assert open_reward_model(folder, {}) == folder
    options = {"preset": "sequence-classification", "tokenizer": chat_tokenizer()}
    assert isinstance(open_reward_model(folder, options), OutcomeRewardModel)


def test_a_model_whose_head_would_be_random_is_refused(tiny_model, tmp_path):
    causal = save_tiny_model(tmp_path / "causal", LlamaForCausalLM, LlamaConfig)
    with pytest.raises(ValueError, match="score.weight would be random"):
        make_trainer(GRPOExtTrainer, tiny_model, [causal], tmp_path)


def test_an_adapter_counts_with_what_it_brings(tiny_model, tmp_path):
    causal = save_tiny_model(tmp_path / "causal", LlamaForCausalLM, LlamaConfig)
    for task, loader in (("CAUSAL_LM", LlamaForCausalLM), ("SEQ_CLS", LlamaForSequenceClassification)):
        adapted = get_peft_model(
            loader.from_pretrained(causal, **({"num_labels": 1} if task == "SEQ_CLS" else {})),
            LoraConfig(task_type=task, target_modules=["q_proj"]),
        )
        adapted.save_pretrained(tmp_path / task)
    with pytest.raises(ValueError, match="CAUSAL_LM' fits no preset.*score.weight would be random"):
        make_trainer(GRPOExtTrainer, tiny_model, [str(tmp_path / "CAUSAL_LM")], tmp_path)
    assert open_reward_model(str(tmp_path / "SEQ_CLS") + "/", {}) == str(tmp_path / "SEQ_CLS")


def test_a_second_trainer_brings_its_own_policys_tokenizer(tiny_model, prm_folder, tmp_path):
    model = ProcessRewardModel.from_pretrained(prm_folder, segmentation=Segmentation(by="newline"))
    for _ in range(2):
        rows = completions_in_lines()
        trainer = make_trainer(
            RecordingExtTrainer, tiny_model, [model], tmp_path, trainer_options={"rollout_func": rows}, max_steps=1
        )
        assert model.policy_tokenizer is trainer._tokenizer
        trainer.train()


def test_the_options_of_all_reward_models_may_hold_a_scope(tiny_model, prm_folder, tmp_path):
    classifier = save_tiny_model(tmp_path / "orm", LlamaForSequenceClassification, LlamaConfig, num_labels=1)
    options = {"segmentation": {"by": "newline", "scope": "answer"}}
    opened = open_reward_models([prm_folder, prm_folder, classifier], options)
    assert [model.segmentation for model in opened[:2]] == [Segmentation("newline", scope="answer")] * 2
    assert opened[0].scorer.backbone is opened[1].scorer.backbone
    # TRL loads and feeds it
    assert opened[2] == classifier


def test_the_prompt_s_ids_say_that_it_has_opened_thinking(tiny_model, prm_folder, tmp_path):
    seen = []

    def judge(completions, completion_ids, prompt_ids, **columns):
        seen.append((columns["prompts"], prompt_ids))
        return [0.0] * len(completions)

    @step_reward(by=Segmentation(by="turn", scope="answer", thinking=[["ab", "z"]]))
    def steps_of(prompt, steps):
        found.add(prompt)
        return [1.0] * len(steps)

    found = set()
    closing = [tiny_tokenizer().convert_tokens_to_ids(token) for token in ("z", "<eos>")]
    trainer = make_trainer(
        GRPOExtTrainer,
        tiny_model,
        [judge, steps_of],
        tmp_path,
        supervision="process",
        per_device_train_batch_size=4 * len(PROMPTS),
        max_steps=1,
        generation_kwargs={"suppress_tokens": closing},
    )
    trainer.train()
    ((prompts, prompt_ids),) = seen
    assert {"ab", "cd"} <= set(prompts)
    assert prompt_ids == [trainer._tokenizer(prompt)["input_ids"] for prompt in prompts]
    # What follows an opening tag at the end of a prompt is thinking until it is closed, and has no steps to judge
    assert found == set(prompts) - {"ab"}


def prepared_for(source, trainer):
    return source.policy_tokenizer is trainer._tokenizer


@pytest.mark.parametrize("kind", ["process reward model", "step_reward"])
def test_two_trainers_with_one_source_each_use_their_own_tokenizer_and_budget(tiny_model, prm_folder, tmp_path, kind):
    source = step_reward(lambda steps: [1.0] * len(steps), by="newline")
    if kind == "process reward model":
        source = ProcessRewardModel.from_pretrained(prm_folder, segmentation="newline")
    trainers = []
    for budget in (64, None):
        options = {"trainer_options": {"rollout_func": completions_in_lines()}, "reward_batch_tokens": budget}
        trainers.append(make_trainer(GRPOExtTrainer, tiny_model, [source], tmp_path, **options))
    first, second = trainers
    assert prepared_for(source, second) and not prepared_for(source, first)
    for trainer, budget in ((first, 64), (second, None), (first, 64)):
        scored_batch(trainer, 8)
        assert prepared_for(source, trainer)
        if isinstance(source, ProcessRewardModel):
            assert (source.accelerator, source.trainer_batch_tokens) == (trainer.accelerator, budget)


def test_config_fields_in_model_init_kwargs_reach_reward_models(tiny_model, prm_folder, tmp_path):
    trainer = make_trainer(GRPOExtTrainer, tiny_model, [prm_folder], tmp_path, model_init_kwargs={"use_cache": False})
    assert trainer.reward_funcs[0].scorer.backbone.loaded.config.use_cache is False


@pytest.mark.parametrize("opening", ["bare id", "load_reward_model", "from_pretrained"])
def test_a_checkpoint_is_located_and_its_preset_looked_up_once(opening, prm_folder, monkeypatch):
    calls = []

    def counting(module, name):
        function = module.__dict__[name]

        def counted(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    counting(checkpoint, "find_adapter_config_file")
    for module in (presets, opening_module):
        counting(module, "find_preset")
    model = {
        "bare id": lambda: open_reward_model(prm_folder, {}),
        "load_reward_model": lambda: load_reward_model(prm_folder),
        "from_pretrained": lambda: ProcessRewardModel.from_pretrained(prm_folder),
    }[opening]()
    assert model.preset.name == "trl-prm"
    assert calls == ["find_adapter_config_file", "find_preset"]
