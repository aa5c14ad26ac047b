"""SIGTERM: when it ends a process, when it is only noted, and with which status."""

import os
import signal
import subprocess
import sys
import threading
import time

import micro
import pytest

from miracle_jax import preemption
from miracle_jax.preemption import Preempted

BUSY = """
import hashlib, sys, time
from miracle_jax import errors, preemption

with errors.one_sentence():
    {block}
"""


def ended(block: str, times: int = 1) -> tuple[int, str, float]:
    """(status, what it said, seconds) of a process that gets SIGTERM as soon as it has said "ready"."""
    command = [sys.executable, "-c", BUSY.format(block=block)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=micro.ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        _, said = process.communicate(timeout=60)
    return process.returncode, said, time.monotonic() - began


def test_a_process_that_has_nothing_to_save_ends_at_once():
    status, said, took = ended("print('ready', flush=True); time.sleep(60)")
    assert (status, said) == (75, "SIGTERM: ended, with nothing to save; run the same command again\n") and took < 5


IN_C = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', {rounds})"  # one call, in which Python runs no handler


def test_what_is_to_be_saved_first_ends_with_the_same_status():
    block = f"""
    with preemption.deferred():
        print('ready', flush=True)
        {IN_C.format(rounds=500_000)}
        stop, _ = preemption.agreed()
        raise preemption.Preempted(f'stopped, {{stop}}')
    """
    status, said, _ = ended(block)
    assert status == 75
    assert said.splitlines() == [
        "SIGTERM: saving and ending; a second one ends at once", "stopped, True; run the same command again to go on",
    ]  # fmt: skip


def test_it_ends_at_once_what_is_long_and_leaves_nothing_to_save():
    block = f"""
    with preemption.deferred():
        with preemption.nothing_to_save():
            print('ready', flush=True)
            {IN_C.format(rounds=300_000_000)}
    """
    status, said, took = ended(block)
    assert status == 75 and said.startswith("SIGTERM: ended, with nothing to save") and took < 5


def test_a_second_one_ends_at_once_even_while_python_runs_no_handlers():
    block = f"""
    with preemption.deferred():
        print('ready', flush=True)
        {IN_C.format(rounds=300_000_000)}
    """
    status, said, took = ended(block, times=2)
    assert status == 143 and "SIGTERM again: ended without saving" in said and took < 5


def test_it_is_noted_until_the_block_ends_and_then_forgotten():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM"), preemption.deferred():
        assert preemption.agreed(True) == (False, True)
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 10
        while not preemption.agreed()[0] and time.monotonic() < until:
            time.sleep(0.001)
        assert preemption.agreed() == (True, False)
        with pytest.raises(Preempted):
            preemption.check()
    preemption.check()
    with preemption.deferred():
        preemption.check()
    assert signal.getsignal(signal.SIGTERM) == before and not preemption.agreed()[0]


def test_other_threads_than_the_main_one_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with preemption.deferred():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
