"""
Credit for turns in TRL's own loops: real tools, an environment and a rollout function, with a tiny policy that calls.

The policy writes a few characters only, so that it calls often: what it writes between `=` and `+`, or the end, is the
argument of a call. Which tokens are the policy's is computed here from the messages, whose characters are the tokens.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.support import oracles
from tests.support.documents import python_example
from tests.support.tiny_models import CHARACTERS, tiny_tokenizer
from tests.support.training import EOS, FIRST_CHARACTER, RecordingExtTrainer, moved_policy
from trl_grpo_ext import GRPOExtConfig, StepRewards, TurnRewards, step_reward


G = 4
ITERATIONS = 3
WRITTEN = "12=+;"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }};{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a;{% endif %}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "a;",
    "fields": {
        "tool_calls": {
            "open": "=",
            "close_pattern": r"\+|<eos>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "twice", "arguments": {"text": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


def twice(text: str) -> str:
    """
    Say it twice.

    Args:
        text: What to say.
    """
    return text + text


class Parrot:
    """An environment with the same tool, which rewards every turn by the length of what was said in it."""

    def reset(self, **kwargs):
        self.said = []

    def twice(self, text: str) -> str:
        """
        Say it twice.

        Args:
            text: What to say.
        """
        self.said.append(text)
        return text + text

    def get_reward(self):
        # Calls after the last iteration do not run
        return TurnRewards([float(len(text)) for text in self.said], per="tool_call")


class Seen:
    """A reward function of turns, calls or the whole, which remembers the batches that it saw."""

    def __init__(self, name, judge):
        self.__name__ = name
        self.judge = judge
        self.batches = []

    def __call__(self, completions, completion_ids, tool_mask, **columns):
        self.batches.append((completions, completion_ids, tool_mask))
        return [self.judge(messages, ids) for messages, ids in zip(completions, completion_ids, strict=True)]


def written(messages):
    return [message for message in messages if message["role"] == "assistant"]


def results(messages):
    return [message["content"] for message in messages if message["role"] == "tool"]


def of_turns(messages, ids):
    return TurnRewards([len(turn.get("tool_calls") or []) - 0.5 * i for i, turn in enumerate(written(messages))])


def of_calls(messages, ids):
    return TurnRewards([0.25 * len(result) - 1 for result in results(messages)], per="tool_call")


def outcome(messages, ids):
    return len(ids) % 5 / 4


def policy_tokens(messages, ids):
    """Which tokens the policy wrote: a turn is what comes up to its end, a result has a token for each character."""
    mask = []
    position = 0
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        if message["role"] == "tool":
            length = len(f"t;{message['content']}") + 1
            # Before the policy goes on comes what opens its turn
            length += len("a;") * (following is None or following["role"] == "assistant")
            mask += [0] * length
        else:
            rest = ids[position:]
            length = rest.index(EOS) + 1 if EOS in rest else len(rest)
            mask += [1] * length
        position += length
    return mask


def turn_ends(mask):
    return [t for t, own in enumerate(mask) if own and (t + 1 == len(mask) or not mask[t + 1])]


def talking_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSES
    return tokenizer


def config_of(folder, **config):
    others = [i for i, character in enumerate(CHARACTERS, FIRST_CHARACTER) if character not in WRITTEN]
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2 * G,
        "num_generations": G,
        "max_completion_length": 48,
        "max_tool_calling_iterations": ITERATIONS,
        "generation_kwargs": {"suppress_tokens": [0, 1, 3, *others]},
        "supervision": "process",
        "beta": 0.1,
        "kl_estimator": "exact",
    }
    return GRPOExtConfig(**{**defaults, **config, "output_dir": str(folder)})


def conversations():
    prompts = [[{"role": "user", "content": text}] for text in ("12", "ab", "21", "cd")]
    return Dataset.from_dict({"prompt": prompts * 4})


def trained(model, sources, args, **options):
    trainer = RecordingExtTrainer(model, sources, args, processing_class=talking_tokenizer(), **options)
    trainer.train()
    return trainer


def run(model, sources, folder, options, **config):
    return trained(model, sources, config_of(folder, **config), train_dataset=conversations(), **options)


def padded(rows, width, value):
    return np.array([[*row, *[value] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("how", ["tools", "environment"])
def test_each_turn_s_reward_lies_on_its_last_token_and_no_other_has_advantage_or_kl(tiny_model, tmp_path, how):
    torch.manual_seed(3)
    judges = [Seen("turns", of_turns), Seen("calls", of_calls), Seen("outcome", outcome)]
    options = {"tools": [twice]} if how == "tools" else {"environment_factory": Parrot}
    policy = moved_policy(tiny_model)
    reference = moved_policy(tiny_model, distance=0.0)
    before = moved_policy(tiny_model)
    trainer = run(policy, list(judges), tmp_path, options, gamma=0.8, gamma_unit="turn")
    assert trainer.state.log_history[0]["tools/call_frequency"] > 0.5

    most_turns = 0
    for number, batch in enumerate(trainer.batches):
        completions, completion_ids, tool_mask = judges[0].batches[number]
        masks = [policy_tokens(m, ids) for m, ids in zip(completions, completion_ids, strict=True)]
        assert tool_mask == masks
        width = batch["completion_ids"].size(1)
        mask_NT = padded(masks, width, 0)
        np.testing.assert_array_equal(mask_NT, (batch["completion_mask"] * batch["tool_mask"]).numpy())
        rewards = np.full((4 if how == "environment" else 3, 2 * G, width), np.nan)
        for i, (messages, mask) in enumerate(zip(completions, masks, strict=True)):
            ends = turn_ends(mask)
            most_turns = max(most_turns, len(ends))
            answers = iter(results(messages))
            for turn, (end, message) in enumerate(zip(ends, written(messages), strict=True)):
                calls = message.get("tool_calls") or []
                rewards[0, i, end] = len(calls) - 0.5 * turn
                answered = [answer for _, answer in zip(calls, answers, strict=False)]
                if answered:
                    rewards[1, i, end] = sum(0.25 * len(answer) - 1 for answer in answered)
                if how == "environment" and calls and turn < ITERATIONS:
                    # A call runs, and its result is dropped if the completion would become too long
                    rewards[3, i, end] = sum(len(call["function"]["arguments"]["text"]) for call in calls)
            rewards[2, i, ends[-1]] = len(mask) % 5 / 4
        expected = oracles.process_advantages(
            rewards, mask_NT, [1.0] * len(rewards), G, estimator="position", gamma=0.8, gamma_unit="turn"
        )
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(batch["advantages"].numpy(), expected, rtol=1e-5, atol=1e-5)
        assert (batch["advantages"].numpy()[mask_NT == 0] == 0).all()
    assert most_turns > 2

    # The exact KL of the first batch, in the log a mean over the policy's tokens
    batch = trainer.batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    kept = slice(batch["prompt_ids"].size(1) - 1, -1)
    with torch.no_grad():
        logp, ref_logp = (
            m(input_ids=ids, attention_mask=attention).logits[:, kept].double().log_softmax(-1)
            for m in (before, reference)
        )
    divergence = (logp.exp() * (logp - ref_logp)).sum(-1)
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert trainer.state.log_history[0]["kl"] == pytest.approx(
        ((divergence * mask).sum() / mask.sum()).item(), rel=1e-4
    )
    log = trainer.state.log_history[0]
    own_NT = mask.numpy() > 0
    starts_NT = own_NT & ~np.pad(own_NT[:, :-1], ((0, 0), (1, 0)))
    for turn in (1, 2):
        tokens_NT = own_NT & (starts_NT.cumsum(1) == turn)
        assert log[f"advantages/turn_{turn}"] == pytest.approx(batch["advantages"].numpy()[tokens_NT].mean(), abs=1e-6)
    assert {"turns/per_completion", "rewards/turns/turn_1", "rewards/turns/turn_2", "advantages/turn_2"} <= log.keys()


def test_what_the_loss_does_with_tool_tokens(tiny_model, tmp_path):
    """Other advantages and other old log-probs there leave the loss as it is."""
    torch.manual_seed(3)
    trainer = run(tiny_model, Seen("turns", of_turns), tmp_path, {"tools": [twice]}, num_iterations=2, max_steps=1)
    batch = dict(trainer.batches[0])
    outside = (batch["completion_mask"] * batch["tool_mask"]) == 0
    losses = []
    for value in (0.0, 7.0):
        changed = dict(batch)
        changed["advantages"] = batch["advantages"].masked_fill(outside, value)
        changed["old_per_token_logps"] = batch["old_per_token_logps"].masked_fill(outside, -value)
        losses.append(trainer._compute_loss(trainer.model, changed).item())
    assert outside.any() and losses[0] == losses[1]


def test_a_process_source_reads_the_policy_s_turns_only(tiny_model, tmp_path):
    torch.manual_seed(3)
    steps_seen = []

    @step_reward(by="turn")
    def judge(steps, completion):
        steps_seen.append((steps, completion))
        return [float(len(step)) for step in steps]

    turns = Seen("turns", of_turns)
    run(tiny_model, [judge, turns], tmp_path, {"tools": [twice]}, max_steps=1)
    ((completions, completion_ids, masks),) = turns.batches
    texts = []
    for ids, mask in zip(completion_ids, masks, strict=True):
        own_ids = zip(ids, mask, strict=True)
        text = "".join(("?" * FIRST_CHARACTER + CHARACTERS)[i] if own else "|" for i, own in own_ids)
        # The end of each turn belongs to no step
        texts.append([turn.rstrip("?") for turn in text.split("|") if turn.strip("?")])
    assert steps_seen == [(steps, m) for steps, m in zip(texts, completions, strict=True) if steps]
    assert sum(len(steps) > 1 for steps, _ in steps_seen) > 1


def test_a_verdict_on_a_result_is_not_lost(tiny_model, tmp_path):
    """A function that places its verdicts on the last token of each result, without a thought for who wrote it."""
    torch.manual_seed(3)

    def on_results(messages, ids):
        mask = policy_tokens(messages, ids)
        ends = [t for t, own in enumerate(mask) if not own and (t + 1 == len(mask) or mask[t + 1])]
        return StepRewards(ends, [float(t % 3) for t in ends])

    judge = Seen("results", on_results)
    trainer = run(tiny_model, judge, tmp_path, {"tools": [twice]}, max_steps=1)
    assert trainer.state.log_history[0]["rewards/results/masked"] == 0
    assert trainer.state.log_history[0]["rewards/results/turn_1"] > 0


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("env_mask", [1, 1], "completion 0 has 3 tokens, and its mask of the policy's tokens has 2"),
        ("tool_mask", [1, 1, 0], "returned a field 'tool_mask'.*as 'env_mask'"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(tiny_model, tmp_path, name, mask, message):
    def rollout(prompts, trainer):
        fields = {"prompt_ids": [4], "completion_ids": [5, 6, 2], name: mask}
        return {field: [row] * len(prompts) for field, row in fields.items()} | {"logprobs": None}

    with pytest.raises(ValueError, match=message):
        run(tiny_model, Seen("outcome", outcome), tmp_path, {"rollout_func": rollout})


def test_the_example_of_the_documents(tiny_model, tmp_path):
    torch.manual_seed(3)
    names = {
        "model": tiny_model,
        "dataset": conversations(),
        "calculator": twice,
        "judge_answer": Seen("outcome", outcome),
        "GRPOExtConfig": lambda **config: config_of(tmp_path, **config),
        "GRPOExtTrainer": trained,
    }
    exec(python_example("judge_calls"), names)
    log = names["trainer"].state.log_history[0]
    assert log["rewards/judge_calls/turn_1"] >= 1
    assert 0 < log["rewards/judge_calls/unjudged"] < 1
