"""How processes join, with the variables of launchers faked; and several of them on this machine."""

import json
import socket
import subprocess
import sys
import time

import jax
import micro
import processes
import pytest

from miracle_jax import cluster, generate
from miracle_jax.errors import UserError

LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "MPI_", "JAX_COORDINATOR", "NNODES", "NODE_RANK", "TPU_", "KUBERNETES_")


@pytest.fixture
def join(monkeypatch, capsys):
    """Joins with these flags and variables, without JAX: (what is left of the flags, what JAX got, what was printed).
    What was set of JAX is in `join.set`."""
    got, kept = {}, {}

    def initialize(*place, **how):
        got.update(how, place=place)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.setattr(cluster, "_listen", lambda: None)
    monkeypatch.setattr(cluster._jax, "make_gloo_tcp_collectives", cluster._jax.make_gloo_tcp_collectives)  # put back
    monkeypatch.setattr(cluster, "_reach", lambda *_: None)
    for name in list(cluster.os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_grpc_proxy", "")

    def run(*flags, variables=()):
        for name, value in dict(variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["command", *flags])
        rest = cluster.join(None)
        return rest, got, capsys.readouterr().err

    run.set = kept
    return run


@pytest.mark.parametrize("flags", [(), ("--processes", "1")])
def test_without_flags_and_launcher_a_process_is_alone_and_nothing_listens(join, flags):
    rest, got, said = join("runs/x", "--seed", "3", *flags)
    assert rest == ["runs/x", "--seed", "3"] and got == {} and said == ""


def test_processes_of_one_machine_listen_on_loopback(join, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    address = "127.0.0.1:4321"
    rest, got, said = join("runs/x", "--coordinator", address, "--processes", "2", "--process", "1")
    assert got["coordinator_bind_address"] == address
    assert cluster._jax.make_gloo_tcp_collectives.keywords == {"hostname": "127.0.0.1"}
    assert cluster.os.environ["no_grpc_proxy"] == "example.org,127.0.0.1"
    assert not join.set["jax_enable_preemption_service"] and join.set["jax_cpu_collectives_implementation"] == "gloo"


def test_a_caller_from_python_joins_nothing(join):
    assert cluster.join(["runs/x", "--processes", "8"]) == ["runs/x", "--processes", "8"]
    assert join("--help")[1] == {}


def test_flags_come_first(join):
    flags = ("--coordinator", "node7:4321", "--processes", "8", "--process", "3")
    rest, got, said = join("a", *flags, "--b", "c", variables=SLURM)
    assert rest == ["a", "--b", "c"] and got["place"] == ("node7:4321", 8, 3, None)
    assert got["coordinator_bind_address"] is None and got["heartbeat_timeout_seconds"] < 60
    assert said.startswith("process 3 of 8, waiting for the others at node7:4321")
    assert join.set["jax_cpu_collectives_implementation"] == "gloo"


SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[003-004,9]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
XPK = {"NNODES": "2", "NODE_RANK": "0", "JAX_COORDINATOR_ADDRESS": "job-0.set:1234"}


@pytest.mark.parametrize(
    ("variables", "flags", "place"),
    [
        (SLURM, (), ("gpu003:61441", 8, 5, [1])),
        (SLURM, ("--coordinator", "gpu003:77"), ("gpu003:77", 8, 5, [1])),
        (OPEN_MPI_4, (), ("10.96.0.1:62624", 4, 2, [0])),
        (OPEN_MPI_5, ("--coordinator", "a:1"), ("a:1", 4, 1, [1])),
        (MPICH, ("--coordinator", "a:1"), ("a:1", 2, 1, None)),
        (XPK, (), ("job-0.set:1234", 2, 0, None)),
    ],
)
def test_what_the_launcher_says(join, variables, flags, place):
    _, got, said = join(*flags, variables=variables)
    assert got["place"] == place
    assert said.startswith(f"process {place[2]} of {place[1]}, waiting for the others at {place[0]}")


def test_one_task_of_slurm_is_alone(join):
    _, got, said = join(variables=SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert got == {} and said == ""  # and takes all GPUs


@pytest.mark.parametrize(
    ("flags", "variables", "sentence"),
    [
        (("--processes", "2"), {}, "--coordinator and --process are missing; a cluster needs --coordinator HOST:PORT"),
        ((), MPICH, "--coordinator is missing"),
        (("--coordinator", "a:1"), {}, "--processes and --process are missing"),
        (("--processes", "two"), {}, "--processes is 'two'; it is a whole number"),
        (("--coordinator", "a", "--processes", "2", "--process", "0"), {}, "--coordinator is 'a'; it is HOST:PORT"),
        (("--coordinator", "a:0", "--processes", "2", "--process", "0"), {}, "--coordinator is 'a:0'; it is HOST:PORT"),
        (("--coordinator", "a:1", "--processes", "2", "--process", "2"), {}, "--process is 2 of 2 --processes; they"),
        (("--processes", "1", "--process", "1"), {}, "--process is 1, but there is one process; its number is 0"),
        ((), SLURM | {"SLURM_NTASKS": "x"}, "what the launcher says of the cluster cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(join, flags, variables, sentence):
    with pytest.raises(UserError) as refused:
        join(*flags, variables=variables)
    assert str(refused.value).startswith(sentence)


def test_a_taken_port_and_a_coordinator_that_is_not_there_are_refused(monkeypatch):
    """Where JAX would end the process, by a segmentation fault and an abort."""
    monkeypatch.setattr(cluster, "WAIT", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port} of this machine .*; give another with"):
            cluster._reach("127.0.0.1", port, 0)
        cluster._reach("127.0.0.1", port, 1)
    with pytest.raises(UserError, match=f"the first process does not answer at 127.0.0.1:{port} .*; is it running"):
        cluster._reach("127.0.0.1", port, 1)


# ------------------------------------------------------------------------------------------------ real processes

JOINED = """
import sys
from miracle_jax import cluster
from miracle_jax.errors import UserError, one_sentence
with one_sentence():
    mode = cluster.join(None)
    me = cluster.distributed.global_state.process_id
"""


def together(code: str, *mode: str) -> list[subprocess.CompletedProcess]:
    """The code after `join` in two processes; `me` is the number of each."""
    body = JOINED + "".join(f"    {line}\n" for line in code.strip().splitlines())
    return processes.run("-c", body, *mode, processes=2)


TALK = """
print(cluster.tell([me, "first"]), cluster.collect(10 * me), cluster.one_first(lambda: me), me)
worked = []
print(list(cluster.spread([5, 6, 7], lambda device, item: worked.append(item) or [item, me])))
print(worked, file=sys.stderr)
"""
MEET = """
import time
import jax
from miracle_jax import compiled

def double(x):
    time.sleep(me)
    return 2 * x

together, began = cluster.together(jax.jit(double)), time.monotonic()
print(together(3.0), time.monotonic() - began >= 1, together(4.0), [p.name for p in compiled.PROGRAMS].count("double"))
"""


def test_processes_tell_each_other():
    first, second = together(TALK + MEET)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    said, spread, met = [line for line in first.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert (said, spread) == ("[0, 'first'] [0, 10] 0 0", "[[5, 0], [6, 1], [7, 0]]")
    assert met == "6.0 True 8.0 1"  # it waited for the other to compile, and compiled once itself
    assert not [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")]  # the first alone speaks
    assert "process 1 of 2, waiting" in second.stderr and "[6]" in second.stderr and "[5, 7]" in first.stderr


FAIL = """
if me == 1:
    raise UserError("no such file") if mode == ["mistake"] else KeyError("oops")
cluster.collect(None)
"""


@pytest.mark.parametrize("mode", ["mistake", "crash"])
def test_one_that_fails_ends_all_with_its_sentence(mode):
    began = time.monotonic()
    first, second = together(FAIL, mode)
    assert time.monotonic() - began < 20  # far below the time after which a process counts as lost
    sentence, status = {"mistake": ("no such file", 2), "crash": ("'oops'", 1)}[mode]
    assert first.returncode == second.returncode == status
    assert f"error: process 1 stopped: {sentence}" in first.stderr and "Traceback" not in first.stderr
    assert ("error: no such file" if mode == "mistake" else "Traceback") in second.stderr


# ------------------------------------------------------------------------------------------------ training, answering


STOPPED_IN_STEP_8 = """
import os, signal
from miracle_jax import cluster, preemption, train

agreed, steps = preemption.agreed, iter(range(1, 21))

def stopping(wanted=False):
    if next(steps) == 8 and not cluster.first():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption._State.noted.wait(60)
    return agreed(wanted)

preemption.agreed = stopping
train.main()
"""


@pytest.mark.slow
def test_two_processes_with_split_parameters_train_as_one_device_though_one_of_them_gets_sigterm(tmp_path):
    """Other meshes, evaluations and baselines are in several_processes.py, more signals in chaos.py."""
    corpus = micro.write_corpus(tmp_path)
    one = processes.train(tmp_path / "one", corpus)
    many, split = micro.Run(tmp_path / "many", [*corpus, *processes.QUICK]), ("--mesh.fsdp", "4")
    for process in processes.run("-c", STOPPED_IN_STEP_8, *many.arguments, *split, processes=2, devices=2):
        assert process.returncode == 75, process.stderr
        assert "stopped by SIGTERM at step 9 of 20, which is saved; run the same command again" in process.stderr
    assert [path.name for path in (many.workdir / "checkpoints").iterdir()] == ["9"]
    processes.assert_same_losses(processes.train(many.workdir, corpus, *split, processes=2, devices=2), one)


def test_two_processes_generate_the_file_of_one(tiny_run, tmp_path):
    contexts = processes.contexts(tmp_path)
    flags = ["--data", contexts, "--samples", "2", "--decode.temperature", "0.9", "--decode.max-new-tokens", "6"]
    one, many = tmp_path / "one", tmp_path / "many"
    generate.main([str(tiny_run.workdir), *flags, "--out", str(one)])
    first, second = processes.succeed("miracle_jax.generate", tiny_run.workdir, *flags, "--out", many, processes=2)
    assert "wrote 600 replies" in first.stderr and "wrote" not in second.stderr
    assert one.read_bytes() == many.read_bytes() and not list(tmp_path.glob(".*"))
    assert len({json.loads(line)["reply"] for line in one.read_bytes().splitlines()}) > 50
