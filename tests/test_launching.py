"""Starting processes in tests: a failure is one, and so is a hang."""

import psutil
import pytest

from tests.support.launching import launch


pytestmark = pytest.mark.distributed


def test_processes_that_do_not_end_are_a_failure_and_ended():
    # timeit runs a statement, and torch's launcher gives each process a session of its own
    statement = "import time; print('begun', flush=True); time.sleep(987)"
    with pytest.raises(pytest.fail.Exception, match="no end after 25 s:(?s:.*)begun"):
        launch("ddp", "timeit", "-n", "1", "-r", "1", statement, timeout=25)
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if statement in (process.info["cmdline"] or [])
    ]


def test_processes_that_fail_are_a_failure():
    with pytest.raises(AssertionError, match="KeyError"):
        launch("ddp", "timeit", "-n", "1", "-r", "1", "raise KeyError")
