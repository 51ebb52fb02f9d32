"""The command `python -m trl_grpo_ext.serve MODEL`: a reward model behind HTTP."""

import sys
from importlib.util import find_spec


def main() -> None:
    """Serve the model of the command line, or say what has to be installed first."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}. The server needs `pip install 'trl_grpo_ext[serve]'`.")
    # Not on top, where it would fail without them
    from .reward_models.remote.server import main as serve

    serve()


if __name__ == "__main__":
    main()
