"""The policy: a Llama of 0.2 million parameters, its supervised warm-up, and its evaluation with the tool."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl.chat_template_utils import parse_response

from two_turns.task import (
    MAX_TURN_LENGTH,
    TOKENIZER,
    Message,
    calculator,
    is_right_answer,
    is_right_call,
    question,
    worked_solution,
)


WARM_UP_BATCH = 64


def build_policy() -> LlamaForCausalLM:
    """A policy with random weights."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return LlamaForCausalLM(config)


def supervised_loss(policy: PreTrainedModel, problems: Sequence[str]) -> torch.Tensor:
    """Cross-entropy of the policy's own messages in the worked solutions: the call and the answer."""
    batch = TOKENIZER.apply_chat_template(
        [worked_solution(problem) for problem in problems],
        tools=[calculator],
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "right"},
    )
    labels = batch["input_ids"].masked_fill(torch.as_tensor(batch["assistant_masks"]) == 0, -100)
    return policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss


def warm_up(problems: Sequence[str], validation: Sequence[str], stop_at: float) -> LlamaForCausalLM:
    """
    Train a new policy on worked solutions, each problem seen once, until it is right often enough.

    Args:
        problems (`Sequence[str]`):
            Problems to train on, 64 per update.
        validation (`Sequence[str]`):
            Problems whose accuracy ends the training.
        stop_at (`float`):
            That accuracy.
    """
    policy = build_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    batches = [problems[start : start + WARM_UP_BATCH] for start in range(0, len(problems), WARM_UP_BATCH)]
    with tqdm(batches, desc="Warm-up") as bar:
        for update, batch in enumerate(bar, start=1):
            loss = supervised_loss(policy, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # An evaluation costs more than an update, and calls are wrong until the loss is this low
            if update % 4 == 0 and loss.item() < 0.45:
                score = evaluate(policy, validation)
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{score.accuracy:.2f}")
                if score.accuracy >= stop_at:
                    break
    return policy


def until_eos(ids: list[int]) -> list[int]:
    """Generated ids without the padding after the end-of-sequence token."""
    eos = TOKENIZER.eos_token_id
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@torch.no_grad()
def write_turn(policy: PreTrainedModel, conversations: Sequence[Sequence[Message]]) -> list[Message]:
    """The policy's next message in each conversation, the likeliest token at each place."""
    prompts = TOKENIZER.apply_chat_template(
        list(conversations), tools=[calculator], add_generation_prompt=True, return_dict=False
    )
    batch = TOKENIZER.pad({"input_ids": prompts}, return_tensors="pt").to(policy.device)
    output = policy.generate(**batch, max_new_tokens=MAX_TURN_LENGTH, do_sample=False)
    turns = [until_eos(ids) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]
    return [
        parse_response(TOKENIZER, turn, prefix=prompt, tools=[calculator])
        for turn, prompt in zip(turns, prompts, strict=True)
    ]


def tool_messages(message: Message) -> list[Message]:
    """What the tool says to each call of a message."""
    said = []
    for call in message.get("tool_calls", []):
        try:
            content = calculator(**call["function"]["arguments"])
        except (TypeError, ValueError) as error:
            content = str({"error": str(error)})
        said.append({"role": "tool", "name": call["function"]["name"], "content": content})
    return said


def converse(policy: PreTrainedModel, problems: Sequence[str]) -> list[list[Message]]:
    """A completion for each problem: a turn and, where that calls the tool, what the tool says and another turn."""
    prompts = [question(problem) for problem in problems]
    completions = [[message] for message in write_turn(policy, prompts)]
    called = [row for row, (message,) in enumerate(completions) if message.get("tool_calls")]
    for row in called:
        completions[row] += tool_messages(completions[row][0])
    if called:
        answers = write_turn(policy, [prompts[row] + completions[row] for row in called])
        for row, answer in zip(called, answers, strict=True):
            completions[row].append(answer)
    return completions


class Score(NamedTuple):
    """
    Shares of problems.

    Attributes:
        accuracy (`float`):
            With the right answer.
        right_calls (`float`):
            With the right call.
        wasted_calls (`float`):
            With the right call and a wrong answer.
        lucky_answers (`float`):
            With a wrong call, or none, and the right answer.
    """

    accuracy: float
    right_calls: float
    wasted_calls: float
    lucky_answers: float


def evaluate(policy: PreTrainedModel, problems: Sequence[str]) -> Score:
    """
    Check completions of these problems by exact arithmetic.

    Decoding is greedy. A sampled accuracy would also rise if the policy only became more certain of what it writes.
    """
    calls = []
    answers = []
    for problem, completion in zip(problems, converse(policy, problems), strict=True):
        calls.append(is_right_call(problem, completion))
        answers.append(is_right_answer(problem, completion))
    pairs = list(zip(calls, answers, strict=True))
    counts = [sum(answers), sum(calls), pairs.count((True, False)), pairs.count((False, True))]
    return Score(*[count / len(problems) for count in counts])
