"""Stopping on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from align.signals import StopFlag, output_closed, stop_requested

WAITER = """
import sys, time
from align.signals import StopFlag, output_closed, stop_requested
with StopFlag(same_within=float(sys.argv[1])):
    print("ready", flush=True)
    while stop_requested() is None:
        time.sleep(0.01)
    print(stop_requested(), flush=True)
    time.sleep(60)
"""


def waiting(*before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", WAITER, "0"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_a_closed_terminal_asks_and_is_never_the_second_signal() -> None:
    """The shell and the kernel may both tell of it."""
    with waiting() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == f"{int(signal.SIGHUP)}\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143


def test_with_nohup_a_closed_terminal_is_nothing() -> None:
    with waiting("nohup") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"{int(signal.SIGINT)}\n"
        process.kill()


def test_who_is_left_alone_before_it_could_ask_the_kernel_ends_as_well() -> None:
    code = (
        "import os, sys; from align.signals import end_with; end_with(os.getppid() + int(sys.argv[1])); print('here')"
    )
    for off, expected in ((0, (0, "here\n")), (1, (137, ""))):
        done = subprocess.run([sys.executable, "-c", code, str(off)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITER, "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
        process.send_signal(number)
        assert process.wait(timeout=5) == 128 + number


def test_a_launchers_copy_of_a_signal_is_no_second_request() -> None:
    """The terminal sends Ctrl-C to every process, and the launcher passes it on once more."""
    with subprocess.Popen([sys.executable, "-c", WAITER, "0.5"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "2\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def test_what_was_installed_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopFlag():
        assert stop_requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while stop_requested() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop_requested() == signal.SIGTERM
    assert stop_requested() is None
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with StopFlag():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []


def test_output_that_is_closed_asks_and_a_ctrl_c_after_it_is_the_first() -> None:
    """In a pipe Ctrl-C may end the reader before it reaches the writer; that must not end the writer at once."""
    output_closed()
    assert stop_requested() is None, "nothing runs that could save"
    with StopFlag():
        output_closed()
        assert stop_requested() == signal.SIGPIPE
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_requested() == signal.SIGINT
        output_closed()
        assert stop_requested() == signal.SIGINT
    assert stop_requested() is None
