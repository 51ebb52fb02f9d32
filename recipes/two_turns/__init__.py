"""
A calculator in two turns, the task of `calculator.py`.

| file | holds |
|---|---|
| `task` | problems, the tool, worked solutions, what is right, and the policy's tokenizer with its chat template |
| `policy` | the policy: built, warmed up by supervised fine-tuning, and evaluated with the tool |
| `plot` | the figure of a comparison |
| `grid.csv` | the learning rates that were tried |
| `comparison.csv`, `comparison.svg` | the comparison |
"""
