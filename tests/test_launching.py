"""Starting processes in tests: a failure is one, and so is a hang."""

import subprocess
import time

import psutil
import pytest

from tests.support.launching import launch


pytestmark = pytest.mark.distributed


def test_processes_that_do_not_end_are_a_failure_and_ended(forked_python, tmp_path, monkeypatch):
    communicate = subprocess.Popen.communicate

    def communicate_until_begun(process, timeout=None):
        while timeout is not None and process.poll() is None and len([*tmp_path.iterdir()]) < 2:
            time.sleep(0.1)
        # The time is up as soon as the statement runs in both, however long the machine takes to come to it
        return communicate(process, timeout=timeout and 0.1)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate_until_begun)
    # timeit runs a statement, and torch's launcher gives each process a session of its own
    begun = f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').close()"
    statement = f"import os, time; print('begun', flush=True); {begun}; time.sleep(987)"
    with pytest.raises(pytest.fail.Exception, match="no end after 600 s:(?s:.*)begun"):
        launch(forked_python, "ddp", "timeit", "-n", "1", "-r", "1", statement)
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if statement in (process.info["cmdline"] or [])
    ]


def test_processes_that_fail_are_a_failure(forked_python):
    with pytest.raises(AssertionError, match="KeyError"):
        launch(forked_python, "ddp", "timeit", "-n", "1", "-r", "1", "raise KeyError")
