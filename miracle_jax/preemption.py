"""SIGTERM, by which clusters say that they will take the machine away: training saves what it has, then ends.

In an entry point SIGTERM ends the process at once with status 75, "run me again": whatever is half-written counts as
absent, so there is nothing to wait for. Training has something to save, so there it is only noted; the loop looks for
it after every step and every batch of validation, in all processes at the same place, saves and ends with the same
status. A second SIGTERM ends the process at once, and so does the first before there is a step to save.

The signal is heard in a thread of its own, by way of a pipe: Python runs handlers between two lines of the main thread,
which may be compiling for minutes.
"""

import contextlib
import functools
import os
import signal
import sys
import threading

PREEMPTED = 75
"""Exit status; EX_TEMPFAIL of sysexits.h."""


class Preempted(Exception):
    """A run that was told to stop, has saved its state and goes on with the same command."""


class _State:
    noted = threading.Event()  # SIGTERM came while something was to be saved first
    deferring = False
    under_way = None  # what `agreed` has asked the other processes


@contextlib.contextmanager
def watched():
    """SIGTERM ends the process with status PREEMPTED while the block runs. Threads other than the main one, in which
    Python can set no handlers, leave it as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listener = threading.Thread(target=_listen, args=(reader,), daemon=True)
    listener.start()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)  # without one nothing is written to the pipe
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        os.close(writer)
        listener.join()


def _listen(reader: int) -> None:
    """Reads numbers of signals until the pipe is closed."""
    with open(reader, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGTERM:
                continue
            if _State.noted.is_set():
                os.write(2, b"SIGTERM again: ended without saving\n")
                os._exit(128 + signal.SIGTERM)
            if not _State.deferring:
                os.write(2, b"SIGTERM: ended, with nothing to save; run the same command again\n")
                if "miracle_jax.cluster" in sys.modules:
                    sys.modules["miracle_jax.cluster"].leave(PREEMPTED, "SIGTERM")
                os._exit(PREEMPTED)
            _State.noted.set()
            os.write(2, b"SIGTERM: saving and ending; a second one ends at once\n")


@contextlib.contextmanager
def deferred():
    """While the block runs SIGTERM is only noted, for `agreed` and `check`. Raises Preempted at the end of a block that
    came to its own end meanwhile."""
    with watched():
        _State.noted.clear()
        _State.deferring, _State.under_way = True, None
        try:
            yield
            if _State.noted.is_set():
                raise Preempted("stopped by SIGTERM")
        finally:
            _State.deferring = False
            _State.noted.clear()


@contextlib.contextmanager
def nothing_to_save():
    """In a `deferred` block: SIGTERM ends the process at once while this one runs, in which it may be compiling for
    longer than the machine is left. Raises Preempted if it came before."""
    if _State.noted.is_set():
        raise Preempted("stopped by SIGTERM")
    _State.deferring = False
    try:
        yield
    finally:
        _State.deferring = True


def agreed(wanted: bool = False) -> tuple[bool, bool]:
    """Whether SIGTERM came, and whether something else is wanted; each is True if it is so in any process.

    All processes get the same, provided that all call this equally often and in the same order as their other joint
    computations. Where there are several they get what was so at the call before: it is read when the step that was
    given to the devices in between has not even begun, and nobody waits.
    """
    import jax

    asked = (_State.noted.is_set(), wanted)
    if jax.process_count() == 1:
        return asked
    before, _State.under_way = _State.under_way, _any_process(asked)
    return (False, False) if before is None else tuple(jax.device_get(before.addressable_data(0)).tolist())


def _any_process(flags: tuple[bool, ...]):
    """Starts to compute the flags that are set in any process."""
    import jax
    import numpy as np

    by_device, join = _joint_or()
    rows = np.tile(np.array(flags), (jax.local_device_count(), 1))
    return join(jax.make_array_from_process_local_data(by_device, rows))


@functools.cache
def _joint_or():
    """The sharding of rows over all devices, a row each, and a jitted function that puts them together by `or`."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = Mesh(jax.devices(), "all")
    by_device, everywhere = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("all",), ()))
    return by_device, jax.jit(lambda rows: rows.any(axis=0), out_shardings=everywhere)


def check() -> None:
    """Raises Preempted if SIGTERM came to any process; for computations that need not be completed. See `agreed`."""
    if _State.deferring and agreed()[0]:
        raise Preempted("stopped by SIGTERM")
