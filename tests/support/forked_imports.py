"""
Imports the package beside a TRL that other statements have changed: once for each statement on the command line, in
forks of one process that has imported TRL. Prints the exit code, stdout and stderr of each as JSON.

    python -m tests.support.forked_imports STATEMENT ...
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import trl.trainer.grpo_trainer
import trl.trainer.utils


def import_after(statement: str, folder: str) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(os.path.join(folder, name), "w") as file:
            os.dup2(file.fileno(), number)
    exec(statement, {"trl": trl})
    import trl_grpo_ext  # noqa: F401

    print("imported")


def imported_after(statement: str) -> dict[str, str | int | None]:
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=import_after, args=(statement, folder))
        process.start()
        process.join()
        printed = {path.name: path.read_text() for path in Path(folder).iterdir()}
    return {"returncode": process.exitcode, **printed}


if __name__ == "__main__":
    assert "trl_grpo_ext" not in sys.modules
    print(json.dumps([imported_after(statement) for statement in sys.argv[1:]]))
