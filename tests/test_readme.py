"""The README's examples, run as they stand, on a small model with a real tokenizer."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import smollm2
from tests.support.training import FixedCompletions, RecordingExtTrainer
from trl_grpo_ext import ESTIMATORS, GRPOExtConfig, GRPOExtTrainer


# In one process with the other tests of real tokenizers, which take seconds to load
pytestmark = pytest.mark.xdist_group("tokenizers")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# With SmolLM2's tokenizer the blank line is a token of its own, after the token that ends the sentence
COMPLETIONS = [
    "First, 3 * 4 = 12 apples.\n\nThen 12 - 2 = 10.\n\nThe answer is 10.",
    "12 - 2 = 34\n\n34",
]
STEPS = [["First, 3 * 4 = 12 apples.", "Then 12 - 2 = 10.", "The answer is 10."], ["12 - 2 = 34", "34"]]


def block_with(text: str) -> str:
    (block,) = [block for block in BLOCKS if text in block]
    return block


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A tiny Llama with SmolLM2's tokenizer and chat template."""
    if reason := smollm2.missing_packages():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = smollm2.load_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=tokenizer.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_first_example_finds_the_steps_of_real_text(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = smollm2.load_tokenizer()
    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in COMPLETIONS]
    judged = []

    def is_right(problem, step):
        judged.append((problem, step))
        return "34" not in step

    questions = ["Apples?", "Pears?"]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    rows = FixedCompletions([[1, 2], [1, 2], [1, 2], [1, 2]], [ids[0], ids[1], ids[1], ids[0]])

    class FixedTrainer(RecordingExtTrainer):
        def __init__(self, model, reward_funcs, args, train_dataset):
            super().__init__(model, reward_funcs, args, train_dataset, rollout_func=rows)

    # The example's own code, with what makes it a matter of seconds
    code = block_with("@step_reward").replace("GRPOExtTrainer, step_reward", "step_reward")
    small = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    small |= {"num_generations": 2, "per_device_train_batch_size": 4}
    code = code.replace("GRPOExtConfig(", "GRPOExtConfig(**small, ")
    names = {
        "is_right": is_right,
        "small": small,
        "model": policy,
        "dataset": Dataset.from_dict({"prompt": prompts, "answer": ["10.", "10."]}),
        "GRPOExtTrainer": FixedTrainer,
    }
    exec(code, names)
    trainer = names["trainer"]

    assert {step for _, step in judged} == {step for steps in STEPS for step in steps}
    assert {problem for problem, _ in judged} == set(questions)
    (batch,) = trainer.batches
    advantages = batch["advantages"]
    for row, text in enumerate([COMPLETIONS[i] for i in (0, 1, 1, 0)]):
        right = text == COMPLETIONS[0]
        # Every token of the right solution is above its group's mean, every token of the wrong one below
        assert ((advantages[row, : len(tokenizer.encode(text))] > 0) == right).all()
    logged = trainer.state.log_history[0]
    assert logged["rewards/judge_steps/steps"] == 2.5
    assert logged["rewards/judge_steps/step_mean"] == pytest.approx(0.6)
    assert logged["rewards/judge_answer/mean"] == 0.5


def test_the_example_of_an_extension_runs(monkeypatch):
    monkeypatch.delitem(ESTIMATORS, "no_baseline", raising=False)
    names: dict = {}
    exec(block_with('ESTIMATORS["no_baseline"]'), names)
    assert issubclass(names["Bounded"], GRPOExtTrainer)
    assert ESTIMATORS.pop("no_baseline").function is names["no_baseline"]


def test_the_example_of_a_config_of_ones_own_parses(tmp_path, monkeypatch):
    line = f"--output_dir {tmp_path} --system_prompt Think. --supervision process --gamma 0.5 --use_cpu --bf16 false"
    monkeypatch.setattr("sys.argv", ["train.py", *line.split(), "--dataset_name", "data"])
    names: dict = {"__name__": "train"}
    exec(block_with("class MyConfig"), names)
    args = names["args"]
    assert (args.system_prompt, args.supervision, args.gamma) == ("Think.", "process", 0.5)
    assert isinstance(args, GRPOExtConfig) and names["script_args"].dataset_name == "data"
