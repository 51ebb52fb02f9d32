"""
Quickstart: a small policy learns running sums with GRPO under process supervision. Offline, on a CPU, in minutes.

    pip install -e ".[recipes]" && python recipes/quickstart.py

The task: after `3+4-2+5-1=` the policy writes a step per operation, then the answer: `3+4=7;7-2=5;5+5=10;10-1=9;#9`.
The policy, a Llama of 0.6 million parameters, is first fine-tuned on worked solutions until about half of its answers
are right. Then GRPO trains it on its own completions and the rewards that they get. Beside this script, in
`running_sums/`, are the task, the warm-up and the report.

What differs from plain GRPO:

1. `supervision="process"`: each step gets a reward, and each token an advantage of its own. A completion with a wrong
   answer still teaches which of its steps were right.
2. Two reward sources with weights: `judge_steps` judges each step, `judge_answer` the final answer.
3. `gamma`: a token's return is the discounted sum of the rewards from that token on.
4. `kl_estimator="exact"`: at every token, the KL to the warmed-up policy is summed over the whole vocabulary. Plain
   GRPO estimates it from the token that was sampled.

Everything else is TRL's: without these four settings and the two `Ext`, this is a script for [`~trl.GRPOTrainer`].

Expect, on 2 CPU cores, 200 s and the accuracy on held-out problems to rise from about 50 % to about 90 % (measured
with seeds 0, 1, 2: 52 % -> 97 %, 41 % -> 75 %, 51 % -> 89 %).

Written to `output_dir`: `metrics.json`, `learning_curve.png`, and the policy in `warmed_up/` and `policy/`.

To see which token earned what, train with `--log_credit 2`, then open the report:

    python -m trl_grpo_ext.report outputs/quickstart --open
"""

import time
from pathlib import Path

from datasets import Dataset
from running_sums.policy import evaluate, save, warm_up
from running_sums.report import training_log, use_short_progress_bar, write_report
from running_sums.task import TOKENIZER, right_answer, right_steps, split_steps, text_of
from running_sums.training import SumsArguments, problems_for, start_process, training_settings
from trl import TrlParser

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, StepRewards


def judge_steps(prompts: list[str], completion_ids: list[list[int]], **columns) -> list[StepRewards]:
    """Process source: a reward on the last token of each step, 1 if the step is right, else 0."""
    # `@step_reward` is shorter, and gives no reward to the end-of-sequence token. Here that token is the last one of a
    # step that the policy left unfinished, and of a completion without any step
    rewards = []
    for problem, completion in zip(prompts, completion_ids, strict=True):
        steps = split_steps(completion)
        right = right_steps(problem, [step.text for step in steps])
        rewards.append(StepRewards(ends=[step.end for step in steps], values=[float(value) for value in right]))
    return rewards


def judge_answer(prompts: list[str], completion_ids: list[list[int]], **columns) -> list[float]:
    """Outcome source: a reward for the whole completion, 1 if it ends with the right answer, else 0."""
    rewards = []
    for problem, completion in zip(prompts, completion_ids, strict=True):
        rewards.append(float(right_answer(problem, text_of(completion))))
    return rewards


def grpo_config(args: SumsArguments) -> GRPOExtConfig:
    """The four settings of the list above, and TRL's own."""
    return GRPOExtConfig(
        supervision="process",  # 1
        reward_weights=[1.0, 1.0],  # 2: of judge_steps and judge_answer
        gamma=0.8,  # 3
        kl_estimator="exact",  # 4
        beta=0.01,
        **training_settings(args),
    )


def main(args: SumsArguments) -> None:
    start = time.perf_counter()
    state = start_process(args.seed)
    problems = problems_for(args)
    folder = Path(args.output_dir)
    if state.is_main_process:
        policy = warm_up(problems.warm_up, problems.validation, stop_at=args.warmup_accuracy)
        save(policy, folder / "warmed_up")
    state.wait_for_everyone()

    trainer = GRPOExtTrainer(
        # A path, because the trainer loads the reference of the KL from the same place
        model=str(folder / "warmed_up"),
        processing_class=TOKENIZER,
        reward_funcs=[judge_steps, judge_answer],
        args=grpo_config(args),
        train_dataset=Dataset.from_dict({"prompt": problems.grpo}),
    )
    use_short_progress_bar(trainer)
    before = evaluate(trainer.model, problems.held_out)
    trainer.train()
    after = evaluate(trainer.model, problems.held_out)
    trainer.save_model(str(folder / "policy"))

    if state.is_main_process:
        rewards = {"right steps + right answer, per completion": "reward"}
        seconds = round(time.perf_counter() - start, 1)
        write_report(args, training_log(trainer), before, after, rewards, {"seconds": seconds})
        print(f"Took {seconds:.0f} s")
    # Threads of gloo may need Python's lock to finish. They get it while this process waits, not in `end_training`
    state.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser(SumsArguments).parse_args_and_config())
