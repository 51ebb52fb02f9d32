"""
Experiments, one script for each question. README.md says what they show.

| module | question |
|---|---|
| `supervision` | process or outcome supervision, with which estimator and transform? |
| `kl_estimators` | what are the KL estimates biased in, and how much do they scatter? |
| `reward_orders` | sum, then normalise, or the other way round, for sources of another scale? |
| `gaming` | a process reward model that can be gamed: what prevents the collapse? |
| `kl_budget` | how much KL buys how much held-out accuracy? |
| `all` | runs them all |
| `runs`, `figures` | what they share |
"""
