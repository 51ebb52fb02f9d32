"""
Running sums, the task of `quickstart.py` and `reward_models.py`.

| module | holds |
|---|---|
| `task` | problems, worked solutions, the policy's tokenizer, and exact arithmetic that checks steps and answers |
| `policy` | the policy: built, warmed up by supervised fine-tuning, and evaluated |
| `training` | command-line arguments, TRL's settings, and the start of a process |
| `report` | progress bar, table, learning curve and `metrics.json` |
| `mistakes` | solutions with mistakes, as policies make them: training data of reward models |
| `reward_training` | a small process and a small outcome reward model: built, trained and saved |
| `reward_quality` | how well the scores of reward models tell right from wrong |
"""
