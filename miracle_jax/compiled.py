"""What JAX compiles: kept in the user's cache folder for the next process, and told by name and time."""

import hashlib
import logging
import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
from jax import monitoring

log = logging.getLogger("miracle_jax")


class Program(NamedTuple):
    """A jitted function that was traced and compiled."""

    name: str
    seconds: float
    """What that took, tracing included."""
    kept: bool
    """Whether it was read from the cache instead of being compiled."""


def keep() -> None:
    """Switches JAX's persistent compilation cache on, unless the user has set or switched off one by JAX's own
    JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE."""
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = root / "miracle_jax" / f"compiled-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        log.warning("%s cannot be written, so what is compiled now will be compiled again next time", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A name of this kind of CPU: programs for another, in a home folder that machines share, may not run here."""
    described = platform.machine() + platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(errors="replace").partition("\n\n")[0].splitlines()
        described += "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
    return hashlib.sha256(described.encode()).hexdigest()[:8]


PROGRAMS: list[Program] = []
"""All since the process began."""


def summary(programs: list[Program]) -> tuple[float, str]:
    """Seconds, and a sentence."""
    seconds, kept = sum(program.seconds for program in programs), sum(program.kept for program in programs)
    return seconds, f"compiling took {seconds:.0f} s: {len(programs)} programs, {kept} of them read from the cache"


class _Listener:
    """Makes PROGRAMS of the events that JAX reports."""

    def __init__(self):
        self.preparing, self.kept = defaultdict(float), False

    def event(self, event: str, **_) -> None:
        self.kept |= event == "/jax/compilation_cache/cache_hits"

    def duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        name = fun_name.removeprefix("jit(").removesuffix(")")
        self.preparing[name] += seconds  # it is traced, lowered, and at last compiled or read
        if event.endswith("/backend_compile_duration"):
            PROGRAMS.append(Program(name, self.preparing.pop(name), self.kept))
            self.kept = False


_listener = _Listener()
monitoring.register_event_listener(_listener.event)
monitoring.register_event_duration_secs_listener(_listener.duration)
