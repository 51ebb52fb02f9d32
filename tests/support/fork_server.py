"""
A Python that has imported TRL: it takes Python's command lines, and runs each in a fork of one process, the server.
Importing takes ten times what the tests do that start a Python.

The server imports at the first command line, and packages of others alone. This package, the recipes and the tests are
imported by each fork.

    python -m tests.support.fork_server PYTHON LISTENER
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil


IMPORTED = [
    *("trl.trainer.grpo_trainer", "trl.scripts.grpo", "transformers.models.llama.modeling_llama"),
    *("accelerate.commands.launch", "torch.distributed.run"),
]


@contextlib.contextmanager
def fork_server() -> Iterator[str]:
    """The path of a Python that has imported TRL, while the block runs."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen()
        python = Path(folder) / "python"
        client = [sys.executable, "-IS", str(Path(__file__).with_name("fork_client.py")), address]
        python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        python.chmod(0o700)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(python), str(listener.fileno())],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
        # Its standard input ends with the block, or with this process
        with server:
            yield str(python)


def end_tree(pid: int) -> None:
    """End a process and those that it started, those with a session of their own as well."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# In the server


def serve(python: str, listener: socket.socket) -> list[str]:
    """Fork for each command line until standard input ends. Returns in the forks, each with its own."""
    printed = None
    forks = []
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        printed = import_all() if printed is None else printed
        forks.append(os.fork())
        if not forks[-1]:
            listener.close()
            return answer(connection, python, printed)
        connection.close()
    for fork in forks:
        os.waitpid(fork, 0)
    sys.exit()


def import_all() -> str:
    """Import, and return what that wrote to stderr."""
    with tempfile.TemporaryFile("w+") as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        for name in IMPORTED:
            importlib.import_module(name)
        os.dup2(stderr, 2)
        os.close(stderr)
        # In a fork, a collection would copy every page of what was imported
        gc.collect()
        gc.freeze()
        file.seek(0)
        return file.read()


def answer(connection: socket.socket, python: str, printed: str) -> list[str]:
    """Fork once more, and wait for that fork. Returns in it alone, once it is what the client would be as a Python."""
    length, files, _, _ = socket.recv_fds(connection, 20, 3)
    with connection.makefile("rb") as request:
        arguments, folder, environment = json.loads(request.read(int(length)))
    fork = os.fork()
    if fork:
        threading.Thread(target=end_with, args=(connection, fork), daemon=True).start()
        _, status = os.waitpid(fork, 0)
        with contextlib.suppress(BrokenPipeError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # What this process starts by the name of its own interpreter is a fork of the server too
    sys.executable = python
    print(printed, end="", file=sys.stderr, flush=True)
    return arguments


def end_with(client: socket.socket, fork: int) -> None:
    # The client sends nothing more: this is its end
    client.recv(1)
    end_tree(fork)


def run(arguments: list[str]) -> None:
    """Run a command line as Python does."""
    match [argument for argument in arguments[:1] if argument != "-u"] + arguments[1:]:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path[0] = os.getcwd()
            # Python runs a module anew even where it is imported, with a warning
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path[0] = ""
            exec(code, {"__name__": "__main__"})
        case [file, *rest]:
            sys.argv = [file, *rest]
            sys.path[0] = os.path.dirname(file)
            runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    _, path_of_python, listening = sys.argv
    run(serve(path_of_python, socket.socket(fileno=int(listening))))
