"""The command `python -m trl_grpo_ext`: see [`~trl_grpo_ext.cli`]."""

from .cli import main


if __name__ == "__main__":
    main()
