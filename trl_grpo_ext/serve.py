"""The command `python -m trl_grpo_ext.serve MODEL`: a reward model behind HTTP."""

from .reward_models.remote.server import main


if __name__ == "__main__":
    main()
