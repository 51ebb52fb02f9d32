"""
What a launcher starts twice: the first process imports all, and the parts run in forks of it, one for each process in
the environment that the launcher gave it. Importing takes longer than any part does.

    accelerate launch --config_file CONFIG -m tests.support.launched MODELS_FOLDER OUTPUT_FOLDER SHARDING
"""

import json
import os
import sys
import time
from pathlib import Path


def main(models: Path, output: Path, sharding: str) -> None:
    environment = output / f"environment{os.environ['RANK']}.json"
    # Under its own name once it is complete
    environment.with_suffix(".part").write_text(json.dumps(dict(os.environ)))
    environment.with_suffix(".part").rename(environment)
    done = output / "done"
    if os.environ["RANK"] == "0":
        from tests.support.two_processes import run_parts

        environments = [wait_for(output / f"environment{rank}.json").read_text() for rank in (0, 1)]
        run_parts(models, output, sharding, [json.loads(text) for text in environments])
        done.touch()
    # Where the first process fails, the launcher ends this one
    wait_for(done)


def wait_for(path: Path) -> Path:
    while not path.exists():
        time.sleep(0.05)
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
