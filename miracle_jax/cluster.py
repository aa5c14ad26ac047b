"""Processes that train or answer together: how they find each other, and what they tell each other besides arrays.

    python -m miracle_jax.train ... --coordinator HOST:PORT --processes 8 --process 3

Flags count first, then what the launcher's environment says: Slurm, Open MPI, Cloud TPU and GKE as JAX reads them, and
the number and rank that other launchers give, which leave the coordinator to --coordinator. Otherwise the process is
alone, and nothing listens.

All processes run the same command on the same files. The first speaks and writes; when one fails, all stop with its
sentence, and when one is gone, the others stop within HEARTBEAT seconds.
"""

import argparse
import atexit
import contextlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed  # where JAX keeps the launchers that it knows, and its key-value store
from jax._src.lib import _jax

from miracle_jax.errors import UserError, first_line
from miracle_jax.preemption import PREEMPTED

HELP = """
In a cluster every process runs this command; where no launcher tells them of each other, with
--coordinator HOST:PORT  of the first process; --processes N  their number; --process I  which this one is, from 0."""

WAIT = 300
"""Seconds in which all processes have to come."""
HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
FOREVER = 7 * 24 * 3600
"""Seconds that living processes wait for each other: a lost one ends that earlier."""
LOOPBACK = ("127.0.0.1", "localhost")
RANKS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI 5
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("NNODES", "NODE_RANK", ""),  # xpk, GPUs
)
"""Variables by which launchers that JAX does not know give the number of processes, a process' rank, and that on its
machine, where each is to take one GPU."""


LOST = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED|[Cc]onnection|[Gg]loo|[Tt]imed? ?out|[Hh]eartbeat")
"""In what JAX, gloo and Orbax say when another process is gone."""


class Lost(UserError):
    """Another process is gone, or never came. More often it was taken away than mistaken, so the status says "run me
    again"."""

    status = PREEMPTED


class Place(NamedTuple):
    """Where a process is in its cluster."""

    coordinator: str
    """HOST:PORT of the first process."""
    processes: int
    process: int
    devices: list[int] | None = None
    """The machine's GPUs that this process takes. None: all."""


def join(argv: list[str] | None) -> list[str]:
    """Joins the cluster, before JAX looks for devices, and returns the command line without the flags that say how.

    argv: None: that of this process. Another: a caller from Python has joined, or is alone, and nothing happens.

    Raises UserError for flags that do not fit each other and for a port that is taken, Lost for a coordinator that does
    not answer.
    """
    if argv is not None:
        return argv
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("coordinator", "processes", "process"):
        own.add_argument(f"--{name}")
    given, rest = own.parse_known_args(sys.argv[1:])
    if {"-h", "--help"} & set(rest) or jax.distributed.is_initialized():
        return rest
    place = _place(given.coordinator, _number("--processes", given.processes), _number("--process", given.process))
    if place is None:
        return rest
    host, _, port = place.coordinator.rpartition(":")
    others = f"the others at {place.coordinator}, {WAIT} s at most"
    print(f"process {place.process} of {place.processes}, waiting for {others}", file=sys.stderr, flush=True)
    _reach(host, int(port), place.process)
    # JAX's own channel must not go through a proxy, which on 127.0.0.1 could only fail.
    around = [os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy"), host]
    os.environ["no_grpc_proxy"] = ",".join(filter(None, around))
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is heard in preemption.py
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if host in LOOPBACK:  # left alone, gloo listens on the address of the machine's name
        _jax.make_gloo_tcp_collectives = partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
    jax.distributed.initialize(
        place.coordinator, place.processes, place.process, place.devices,
        cluster_detection_method="deactivate", initialization_timeout=WAIT, heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=FOREVER, coordinator_bind_address=place.coordinator if host in LOOPBACK else None,
    )  # fmt: skip
    _listen()
    return rest


def _place(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """From the flags, of which each may be missing, and the environment. None: there is one process."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")  # JAX's own
    devices = None
    if processes != 1 and None in (coordinator, processes, process):
        try:
            coordinator, processes, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, processes, process, None, None, WAIT
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(
                f"what the launcher says of the cluster cannot be read ({first_line(error)}); give --coordinator, "
                "--processes and --process"
            ) from error
        for size, rank, local in RANKS if processes is None and process is None else ():
            if size in os.environ and rank in os.environ:
                processes, process = (_number(name, os.environ[name]) for name in (size, rank))
                devices = [_number(local, os.environ[local])] if local in os.environ else None
                break
    if processes == 1 or (coordinator, processes, process) == (None, None, None):
        if process:
            raise UserError(f"--process is {process}, but there is one process; its number is 0")
        return None
    named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in named.items() if value is None]:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; a cluster needs --coordinator "
            "HOST:PORT of its first process, --processes N and --process I, where the launcher does not tell them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it is HOST:PORT of the first process, such as node1:4321")
    if processes < 1 or not 0 <= process < processes:
        raise UserError(f"--process is {process} of {processes} --processes; they are numbered from 0")
    return Place(coordinator, processes, process, devices)


def _number(name: str, text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it is a whole number")
    return None if text is None else int(text)


def _reach(host: str, port: int, process: int) -> None:
    """Makes sure of what JAX would end the process for without a word: its port is free, or the first process there."""
    if process == 0:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind((host if host in LOOPBACK else "", port))
            except OSError as error:
                raise UserError(
                    f"the coordinator cannot listen on port {port} of this machine ({error.strerror}); give another "
                    "with --coordinator"
                ) from None
        return
    end = time.monotonic() + WAIT
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise Lost(
                    f"the first process does not answer at {host}:{port} ({error}); is it running, is --coordinator "
                    "its address, and can this machine reach that port?"
                ) from None
        time.sleep(0.5)


# ------------------------------------------------------------------------------------------------ one for all


def size() -> int:
    """How many processes there are; unlike jax.process_count, it looks for no devices."""
    return distributed.global_state.num_processes


def first() -> bool:
    """Whether this is the process that speaks and writes."""
    return distributed.global_state.process_id == 0


_ending = threading.Event()  # this process is about to, and has said why
FAILED = "miracle_jax/failed/"


def _listen() -> None:
    """Lets this process stop when another fails, and the first alone speak."""
    hook, client = sys.excepthook, distributed.global_state.client

    def fail(kind, error, trace):
        if gone := lost(error):
            print(f"error: {gone}", file=sys.stderr, flush=True)
            leave(gone.status, str(gone))
        if not _ending.is_set():  # else it comes of the other's end
            hook(kind, error, trace)
        leave(1, first_line(error))

    def watch():
        while not _ending.wait(0.5):
            failed = []
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process is gone; JAX will end this one
                failed = client.key_value_dir_get(FAILED)
            for name, what in failed[:1]:
                _ending.set()
                status, sentence = json.loads(what)
                print(f"error: process {name.rpartition('/')[2]} stopped: {sentence}", file=sys.stderr, flush=True)
                _exit(status)

    sys.excepthook = fail
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    # JAX's own goodbye comes after this one, and waits for all; a process that fails never gets there.
    atexit.register(lambda: (_ending.set(), thread.join()))
    if not first():
        sys.stdout = open(os.devnull, "w")  # for as long as the process lives
        logging.getLogger("miracle_jax").setLevel(logging.ERROR)


def lost(error: BaseException) -> Lost | None:
    """What to say of an error that comes of another process' end; None of any other."""
    if size() == 1 or isinstance(error, UserError) or not LOST.search(str(error)):
        return None
    return Lost(f"another process is gone or does not answer ({first_line(error)}); run the same command again")


def leave(status: int, sentence: str) -> None:
    """Ends a process that failed, and all others with it: they would wait for it. Does nothing for one alone.

    What this process had to say has been said; status: its exit status.
    """
    if size() == 1:
        return
    if _ending.is_set():
        time.sleep(60)  # another thread ends this process
    _ending.set()
    state = distributed.global_state
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process is gone, and the store with it
        state.client.key_value_set(f"{FAILED}{state.process_id}", json.dumps([status, sentence]))
    sys.stderr.flush()
    _exit(status)


def _exit(status: int) -> None:
    """Not by Python's way, on which JAX waits for the others. When the first process ends, JAX aborts those that are
    left; when another does, connections break. So all have the time to read why, and the first goes last."""
    time.sleep(4 if first() else 1.5)
    os._exit(status)


# ------------------------------------------------------------------------------------------------ what they tell


_messages = itertools.count()  # the same on all processes, which run the same program


def tell(value: Any) -> Any:
    """The first process' `value`, which JSON can hold, on every process."""
    if size() == 1:
        return value
    client, name = distributed.global_state.client, f"miracle_jax/told/{next(_messages)}"
    if first():
        client.key_value_set(name, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(name, FOREVER * 1000))


def collect(value: Any) -> list:
    """Every process' `value`, which JSON can hold, in their order, on the first process; nothing on the others."""
    if size() == 1:
        return [value]
    client, name = distributed.global_state.client, f"miracle_jax/collected/{next(_messages)}"
    if not first():
        client.key_value_set(f"{name}/{distributed.global_state.process_id}", json.dumps(value))
        return []
    others = [
        json.loads(client.blocking_key_value_get(f"{name}/{i}", FOREVER * 1000)) for i in range(1, size())
    ]  # fmt: skip
    client.key_value_delete(name + "/")
    return [value, *others]


def meet() -> None:
    """Waits until all processes are here."""
    collect(None)
    tell(None)


def together(function: Callable) -> Callable:
    """A jitted function over the devices of all processes, as one that all begin at the same time.

    Before it runs for the first time, and with each new shape of its arguments, all have compiled it: what connects
    processes on CPUs, gloo, gives up when one comes 30 seconds after another, and compiling can differ by more.
    """
    if size() == 1:
        return function
    compiled = set()

    def call(*arguments, **named):
        shapes = tuple(getattr(leaf, "shape", leaf) for leaf in jax.tree.leaves((arguments, named)))
        if shapes not in compiled:
            function.lower(*arguments, **named).compile()  # which the call below finds
            meet()
            compiled.add(shapes)
        return function(*arguments, **named)

    return call


def one_first(call: Callable[[], Any]) -> Any:
    """What `call` returns. The first process calls it alone; the others then find in the caches what that has built."""
    if not first():
        tell(None)
        return call()
    value = call()
    tell(None)
    return value


def spread(items: Sequence, run: Callable[[jax.Device, Any], Any]) -> Iterator:
    """What `run` makes of every item, which JSON can hold, in their order, on the first process; nothing on the others,
    which have to ask for it all the same.

    All devices of all processes work, each on one item at a time, in threads of their own. A result depends on its item
    alone, so it is the same however many devices there are (on CPUs, of processes that may use as many cores).
    """
    here = jax.local_devices()
    together, place = size() * len(here), distributed.global_state.process_id * len(here)
    with ThreadPoolExecutor(len(here)) as threads:
        apply = threads.map if len(here) > 1 else map
        for start in range(0, len(items), together):
            own = items[start:][:together][place:][: len(here)]
            for results in collect(list(apply(run, here, own))):
                yield from results
