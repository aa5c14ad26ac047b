"""The launchers, with commands in the place of gcloud, kubectl, srun, ... that write down how they were called."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("local.sh", "slurm.sh", "tpu.sh", "gke.sh", "worker.sh", "llm.sh")
TOOLS = (
    "gcloud",
    "kubectl",
    "docker",
    "git",
    "srun",
    "scontrol",
    "sbatch",
    "sudo",
    "lsblk",
    "mountpoint",
    "sleep",
    "uv",
    "python3",
)
PREEMPTED = 75

# Adds itself and its arguments to `calls`, keeps what `apply` and `build` are given, and does what the first line
# of `answers` with its subcommand says, once: a part of the command, the exit status and what it prints.
FAKE_TOOL = """#!/bin/bash
{ printf '%s' "${0##*/}"; printf '\\x1f%s' "$@"; printf '\\x1e'; } >>"$FAKES/calls"
if [[ "$*" == *apply* || "$*" == *build* ]]; then cat >"$FAKES/given"; fi
while IFS='|' read -r number part status output; do
    [[ " ${0##*/} $*" == *" $part"* ]] || continue
    sed -i "s/^$number|.*/$number|used never|0|/" "$FAKES/answers"
    if [[ -n $output ]]; then echo "$output"; fi
    exit "$status"
done <"$FAKES/answers"
"""

# Stands in for .venv/bin/python: writes down its arguments, then ends as the next word of `endings` says.
FAKE_PYTHON = """#!/bin/bash
{ printf '%s' "$1"; printf '\\x1f%s' "${@:2}"; printf '\\x1e'; } >>"$FAKES/trainings"
trap 'echo saved; exit 75' TERM
echo "training"
exec 8>>"$FAKES/lock"
flock 8
ending=$(head -n 1 "$FAKES/endings")
sed -i 1d "$FAKES/endings"
exec 8>&-
if [[ $ending == wait ]]; then for _ in {1..200}; do /bin/sleep 0.05; done; fi
exit "${ending:-0}"
"""


class Checkout:
    """The launchers in a folder of their own, and what they called."""

    def __init__(self, folder: Path):
        self.folder, self.fakes, self.home = folder / "miracle_jax", folder / "fakes", folder
        shutil.copytree(ROOT / "launch", self.folder / "launch")
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        self.fakes.mkdir()
        self.write(self.folder / ".venv" / "bin" / "python", FAKE_PYTHON)
        for tool in TOOLS:
            self.write(self.fakes / "bin" / tool, FAKE_TOOL)
        self.write(folder / ".local" / "bin" / "uv", FAKE_TOOL)
        (self.fakes / "endings").touch()
        self.answer()
        path = f"{self.fakes}/bin:{os.environ['PATH']}"
        self.environment = {"PATH": path, "FAKES": str(self.fakes), "HOME": str(folder)}

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def answer(self, *answers: tuple[str, int, str]) -> None:
        """Answers of the fake tools, each given once: (start of a subcommand or argument, exit status, output)."""
        lines = [f"{number}|{part}|{status}|{output}\n" for number, (part, status, output) in enumerate(answers)]
        (self.fakes / "answers").write_text("".join(lines))

    def end(self, *endings) -> None:
        """How trainings end, in turn: an exit status, or "wait" until SIGTERM."""
        (self.fakes / "endings").write_text("".join(f"{ending}\n" for ending in endings))

    def start(self, *command, cwd=None, **variables) -> subprocess.Popen:
        return subprocess.Popen(
            ["/bin/bash", *map(str, command)], cwd=cwd or self.folder, env=self.environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *command, **how) -> subprocess.CompletedProcess:
        process = self.start(*command, **how)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def calls(self, name: str = "calls") -> list[list[str]]:
        path = self.fakes / name
        calls = [call.split("\x1f") for call in path.read_text().split("\x1e")[:-1]] if path.exists() else []
        path.unlink(missing_ok=True)
        return calls

    def trainings(self) -> list[list[str]]:
        return self.calls("trainings")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def words(done) -> list[list[str]]:
    """The commands that a script printed."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


AWKWARD = ["--data.train", "a file.jsonl", 'it\'s "quoted" $HOME $(date) `date` \\n & ; | * ~']
TPU = ["my-tpu", "--zone", "us-west4-a", "--type", "v5litepod-16", "--nfs", "10.0.0.2:/share", "--spot"]
ON_TPU = ["--config", "configs/paper.py", "--workdir", "/mnt/miracle/runs/paper", *AWKWARD]
GKE = [
    "paper",
    "--image",
    "host/miracle:1",
    "--accelerator",
    "tpu-v5-lite-podslice",
    "--topology",
    "4x4",
    "--claim",
    "runs",
]
ON_GKE = ["--config", "configs/paper.py", "--workdir", "/runs/paper", *AWKWARD]
HERE = ["--config", "configs/tiny.py", "--workdir", "runs/two folders", *AWKWARD]


# ---- All of them


@pytest.mark.parametrize("script", LAUNCHERS)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", ROOT / "launch" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    # SC2034: `tries` is used by a function of setup.sh.
    command = ["shellcheck", "-x", "-P", "SCRIPTDIR", "-S", "warning", "-e", "SC2034", *LAUNCHERS, "setup.sh"]
    done = subprocess.run(command, cwd=ROOT / "launch", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_comes_from_any_folder_and_runs_nothing(checkout, script):
    done = checkout.run(f"../miracle_jax/launch/{script}", "--help", cwd=checkout.fakes)
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{script} " in done.stdout and "--dry-run" in done.stdout and "#!/" not in done.stdout
    assert not checkout.calls() and not checkout.trainings()


@pytest.mark.parametrize(
    "line, ends",
    [
        (["local.sh", "--dry-run", "--", *HERE], ["-m", "miracle_jax.train", *HERE]),
        (["slurm.sh", "--dry-run", "--", *HERE], ["-m", "miracle_jax.train", *HERE]),
        (["worker.sh", "start", "--dry-run", "--", *HERE], ["-m", "miracle_jax.train", *HERE]),
        (["worker.sh", "prepare", "--dry-run"], ["blkid", "mkfs.ext4", "mount", "launch/setup.sh", "tpu"]),
        (["worker.sh", "stop", "--dry-run"], ["kill", "-TERM"]),
        (["tpu.sh", "create", *TPU, "--dry-run"], ["queued-resources", "create", "my-tpu", "--spot"]),
        (["tpu.sh", "install", *TPU, "--dry-run"], ["tpu-vm", "scp", "my-tpu:miracle_jax.tar.gz", "--worker=all"]),
        (["tpu.sh", "stop", "my-tpu", "--zone", "z", "--dry-run"], ["tpu-vm", "ssh", "--worker=all"]),
        (
            ["tpu.sh", "delete", "my-tpu", "--zone", "z", "--dry-run"],
            ["queued-resources", "delete", "--force", "--quiet"],
        ),
        (["gke.sh", "image", "paper", "--image", "host/miracle:1", "--dry-run"], ["docker", "push", "host/miracle:1"]),
        (["gke.sh", "run", *GKE, "--dry-run", "--", *ON_GKE], ["kubectl", "apply", "--filename=-"]),
        (["gke.sh", "logs", "paper", "--dry-run"], ["kubectl", "logs", "--follow"]),
        (["llm.sh", "--port", "8123", "--dry-run"], ["llama_cpp.server", "127.0.0.1", "8123", ".llm"]),
        (["gke.sh", "delete", "paper", "--dry-run"], ["kubectl", "delete", "jobset", "paper", "--ignore-not-found"]),
    ],
)
def test_a_dry_run_prints_its_commands_and_runs_none(checkout, line, ends):
    done = checkout.run(f"launch/{line[0]}", *line[1:])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not checkout.calls() and not checkout.trainings()
    printed = [word for command in words(done) for word in command]
    missing = [word for word in ends if word not in printed]
    assert not missing, done.stdout


@pytest.mark.parametrize(
    "line, error",
    [
        (["local.sh", "--dry-run", "--", "--config", "configs/tiny.py"], "the training needs a --workdir"),
        (["local.sh", "--processes", "0", "--", *HERE], "--processes takes a whole number from 1 on, not '0'"),
        (["local.sh", "--config", "configs/tiny.py"], "unknown argument --config; what goes to the training"),
        (["slurm.sh", "--", *HERE], "this runs as a job: sbatch launch/slurm.sh"),
        (["slurm.sh", "--tries"], "--tries takes a whole number from 1 on, not ''"),
        (["worker.sh", "begin"], "unknown command begin; worker.sh takes prepare, start or stop"),
        (["worker.sh", "start", "--"], "the training needs a --workdir"),
        (["tpu.sh", "run"], "run needs a name of small letters, digits and hyphens: bash launch/tpu.sh run NAME"),
        (["tpu.sh", "run", "my-tpu"], "run needs --zone"),
        (["tpu.sh", "run", "my-tpu", "--zone"], "--zone needs a value"),
        (["tpu.sh", "run", "my-tpu", "--zone", "z"], "run needs --type"),
        (["tpu.sh", "run", "my-tpu", "--zone", "z", "--type", "v6e-8"], "run needs a disk that outlives the TPU"),
        (["tpu.sh", "run", *TPU, "--disk", "d"], "give --nfs or --disk, not both"),
        (["tpu.sh", "create", "my-tpu", "--zone", "z", "--type", "v9-8", "--disk", "d"], "name it with --runtime"),
        (["tpu.sh", "run", *TPU, "--", "--workdir", "runs/paper"], "--workdir runs/paper would be lost with the TPU"),
        (["tpu.sh", "delete", "my-tpu", "--zone", "z", "--", "x"], "only run trains"),
        (["gke.sh", "run", "Paper"], "run needs a name of small letters"),
        (["gke.sh", "run", *GKE[:5]], "run needs --topology"),
        (["gke.sh", "run", *GKE, "--chips", "3", "--", *ON_GKE], "no whole number of hosts of 3 chips"),
        (["gke.sh", "run", *GKE, "--", "--workdir=/tmp/x"], "--workdir /tmp/x would be lost with its pod"),
        (["gke.sh", "image", "paper"], "image needs --image"),
    ],
)
def test_a_mistake_is_one_sentence(checkout, line, error):
    done = checkout.run(f"launch/{line[0]}", *line[1:])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert error in done.stderr
    assert not checkout.calls() and not checkout.trainings()


@pytest.mark.parametrize(
    "tool, line",
    [
        ("gcloud", ["tpu.sh", "delete", "my-tpu", "--zone", "z"]),
        ("kubectl", ["gke.sh", "run", *GKE, "--", *ON_GKE]),
        ("docker", ["gke.sh", "image", "paper", "--image", "host/miracle:1"]),
        ("srun", ["slurm.sh", "--", *HERE]),
    ],
)
def test_a_missing_tool_is_one_sentence(checkout, tool, line):
    for name in ("bash", "dirname", "sed", "basename"):
        (checkout.home / "bin").mkdir(exist_ok=True)
        (checkout.home / "bin" / name).symlink_to(shutil.which(name))
    done = checkout.run(f"launch/{line[0]}", *line[1:], PATH=str(checkout.home / "bin"), SLURM_JOB_ID="7")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tool} is not installed; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line", [["local.sh", "--", *HERE], ["slurm.sh", "--", *HERE], ["worker.sh", "start", "--", *HERE]]
)
def test_without_an_environment_it_says_how_to_make_one(checkout, line):
    shutil.rmtree(checkout.folder / ".venv")
    done = checkout.run(f"launch/{line[0]}", *line[1:], SLURM_JOB_ID="7")
    assert done.returncode == 2 and "there is no .venv yet" in done.stderr and "bash launch/setup.sh" in done.stderr


# ---- Processes on one machine


def test_local_processes_get_the_arguments_and_their_places(checkout):
    done = checkout.run("launch/local.sh", "--processes", "3", "--", *HERE)
    assert done.returncode == 0, done.stderr
    trainings = sorted(checkout.trainings(), key=lambda training: training[-1])
    address = trainings[0][-5]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    for number, training in enumerate(trainings):
        flags = ["--coordinator", address, "--processes", "3", "--process", str(number)]
        assert training == ["-m", "miracle_jax.train", *HERE, *flags]
    shown = done.stdout.splitlines()
    assert "training" in shown and "[1] training" in shown and "[2] training" in shown


def test_local_runs_preempted_ones_again_but_not_for_ever(checkout):
    checkout.end(PREEMPTED, 0, 143, PREEMPTED)
    assert checkout.run("launch/local.sh", "--", *HERE).returncode == 0
    assert len(checkout.trainings()) == 6
    checkout.end(*[PREEMPTED] * 4)
    done = checkout.run("launch/local.sh", "--tries", "2", "--", *HERE)
    assert done.returncode == PREEMPTED and "as often as --tries allows" in done.stderr
    assert len(checkout.trainings()) == 4


def test_local_ends_with_the_status_of_a_failure(checkout):
    checkout.end(PREEMPTED, 3)
    assert checkout.run("launch/local.sh", "--", *HERE).returncode == 3
    assert len(checkout.trainings()) == 2


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_notice_on_and_ends_as_preempted(checkout, notice):
    checkout.end("wait", "wait")
    process = checkout.start("launch/local.sh", "--", *HERE)
    until(lambda: (checkout.fakes / "endings").read_text() == "")
    process.send_signal(notice)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == PREEMPTED and "saved" in out and "[1] saved" in out
    assert len(checkout.trainings()) == 2


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- Slurm


def slurm(checkout, *line, **variables):
    """Runs the script as Slurm does: a copy of it, elsewhere, in the folder it was submitted from."""
    spool = checkout.home / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(checkout.folder / "launch" / "slurm.sh", spool / "slurm_script")
    return checkout.run(spool / "slurm_script", *line, SLURM_JOB_ID="7", **variables)


def test_slurm_runs_the_training_once_a_task(checkout):
    done = slurm(checkout, "--", *HERE)
    assert done.returncode == 0, done.stderr
    (call,) = checkout.calls()
    assert call[0] == "srun" and call[-len(HERE) - 3 :] == [".venv/bin/python", "-m", "miracle_jax.train", *HERE]


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [
        (PREEMPTED, "", True),
        (PREEMPTED, "8", True),
        (PREEMPTED, "9", False),
        (143, "", True),
        (2, "", False),
        (137, "", False),
    ],
)
def test_slurm_puts_a_preempted_job_back_but_not_for_ever(checkout, status, restarts, requeued):
    checkout.answer(("srun", status, ""))
    done = slurm(checkout, "--tries", "10", "--", *HERE, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert done.returncode == status
    assert [call for call in checkout.calls() if call[0] == "scontrol"] == [["scontrol", "requeue", "7"]] * requeued


def test_slurm_reads_what_it_is_asked_for_and_refuses_another_folder(checkout):
    text = (ROOT / "launch" / "slurm.sh").read_text()
    asked, commands = text.split("set -euo pipefail", 1)
    assert re.findall("^#SBATCH (.*)$", asked, re.M) and "#SBATCH" not in commands
    assert "--signal=TERM@120" in asked and "--requeue" in asked
    done = checkout.run(checkout.folder / "launch" / "slurm.sh", "--", *HERE, cwd=checkout.home, SLURM_JOB_ID="7")
    assert done.returncode == 2 and "is no checkout of miracle_jax" in done.stderr


# ---- A TPU's worker


def worker(checkout, *line):
    return checkout.run("launch/worker.sh", *line)


def test_worker_shows_the_training_and_ends_with_its_status(checkout):
    checkout.end(0, PREEMPTED, 2)
    for status in (0, PREEMPTED, 2):
        done = worker(checkout, "start", "--", *HERE)
        assert done.returncode == status and done.stdout == "training\n", done.stderr
    assert checkout.trainings() == [["-m", "miracle_jax.train", *HERE]] * 3


def test_a_training_outlives_its_connection_and_is_found_again(checkout):
    checkout.end("wait")
    connection = checkout.start("launch/worker.sh", "start", "--", *HERE)
    until(lambda: (checkout.folder / "runs/worker/log").exists() and (checkout.folder / "runs/worker/log").read_text())
    os.killpg(connection.pid, signal.SIGKILL)
    connection.communicate()
    other = worker(checkout, "start", "--", "--workdir", "runs/other")
    assert other.returncode == 2 and "another training runs in" in other.stderr
    again = checkout.start("launch/worker.sh", "start", "--", *HERE)
    assert "Following the training that runs already" in again.stdout.readline() + again.stdout.readline()
    assert worker(checkout, "stop").stdout.endswith("told to save and end\n")
    out, err = again.communicate(timeout=30)
    assert again.returncode == 130 and "training\n" in out and "saved" in out and "the same line resumes it" in err
    assert "no training runs in" in worker(checkout, "stop").stdout
    assert worker(checkout, "start", "--", *HERE).returncode == 0  # what was stopped is no longer
    assert len(checkout.trainings()) == 2


@pytest.mark.parametrize("new", [True, False])
def test_worker_mounts_its_second_disk_and_formats_a_new_one_only(checkout, new):
    checkout.write(checkout.fakes / "bin" / "bash", FAKE_TOOL)
    checkout.answer(
        ("mountpoint", 1, ""),
        ("lsblk --nodeps", 0, "/dev/sda /dev/sdb"), ("lsblk", 0, "sda / sda1"), ("lsblk", 0, "sdb"),
        ("sudo blkid", 2 if new else 0, ""), ("python find", 0, "/uv/python3.12"),
    )  # fmt: skip
    done = worker(checkout, "prepare")
    assert done.returncode == 0, done.stderr
    calls = [call[1:] for call in checkout.calls() if call[0] == "sudo"]
    formatted = [["mkfs.ext4", "-q", "/dev/sdb"]] * new
    assert [call for call in calls if call[0] != "chmod"] == [
        ["mkdir", "-p", "/mnt/miracle"], ["blkid", "/dev/sdb"], *formatted, ["mount", "/dev/sdb", "/mnt/miracle"]
    ]  # fmt: skip
    assert words(done)[-1] == ["bash", "launch/setup.sh", "PYTHON=/uv/python3.12", "tpu"]


def test_worker_mounts_a_share_whose_locks_end_with_the_machine(checkout):
    checkout.write(checkout.fakes / "bin" / "bash", FAKE_TOOL)
    for mounted in (False, True):
        checkout.answer(("mountpoint", int(not mounted), ""), ("python find", 0, "/uv/python3.12"))
        assert worker(checkout, "prepare", "--share", "10.0.0.2:/share").returncode == 0
        mounts = [call for call in checkout.calls() if call[:2] == ["sudo", "mount"]]
        how = ["-t", "nfs", "-o", "vers=3,hard,local_lock=flock", "10.0.0.2:/share", "/mnt/miracle"]
        assert mounts == [["sudo", "mount", *how]] * (not mounted)


def test_worker_has_no_disk_but_the_systems(checkout):
    checkout.answer(("mountpoint", 1, ""), ("lsblk --nodeps", 0, "/dev/vda"), ("lsblk", 0, "vda /"))
    done = worker(checkout, "prepare")
    assert done.returncode == 2 and "there is no second disk" in done.stderr


# ---- TPU VMs and slices

REQUEST, VM = "queued-resources list", "tpu-vm list"  # by which the script asks for their states


def gcloud(checkout) -> list[str]:
    """What was asked of gcloud: the subcommand, or for ssh what the workers run."""
    names = {"queued-resources list": "request?", "tpu-vm list": "tpu?", "queued-resources create": "create",
             "queued-resources delete": "delete", "tpu-vm scp": "copy", "disks list": "disk?",
             "disks create": "make disk", "config get-value": "project?"}  # fmt: skip
    asked = []
    for call in checkout.calls():
        if call[0] == "gcloud" and "ssh" in call:
            asked.append("train" if "worker.sh start" in call[-1] else call[-1].split("launch/")[-1])
        elif call[0] == "gcloud":
            asked += [short for part, short in names.items() if f" {part} " in f" {' '.join(call)} "]
    return asked


NEW = [(REQUEST, 0, ""), (REQUEST, 0, "ACTIVE"), (VM, 0, "READY")]
READY = NEW[1:]
SETUP = ["copy", "worker.sh prepare --share 10.0.0.2:/share"]


def test_tpu_is_made_once_and_the_same_line_resumes(checkout):
    checkout.answer(*NEW)
    done = checkout.run("launch/tpu.sh", "run", *TPU, "--", *ON_TPU)
    assert done.returncode == 0, done.stderr
    assert gcloud(checkout) == ["request?", "create", "request?", "tpu?", *SETUP, "train"]
    checkout.answer(*READY)
    assert checkout.run("launch/tpu.sh", "run", *TPU, "--", *ON_TPU).returncode == 0
    assert gcloud(checkout) == ["request?", "tpu?", *SETUP, "train"]


def test_tpu_arguments_reach_the_training_as_they_are(checkout):
    checkout.answer(*READY)
    checkout.run("launch/tpu.sh", "run", *TPU, "--", *ON_TPU)
    remote = checkout.calls()[-1]
    assert remote[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-west4-a", "--worker=all"]
    # As gcloud and ssh hand it on: cut at spaces, joined by spaces, read by the shell of the worker, in its home.
    line = " ".join(remote[-1].removeprefix("--command=").split(" "))
    done = checkout.run("-c", line, cwd=checkout.home)
    assert done.returncode == 0, done.stderr
    assert checkout.trainings() == [["-m", "miracle_jax.train", *ON_TPU]]


def test_tpu_waits_in_the_queue_and_asks_anew_for_what_was_taken(checkout):
    checkout.answer(
        (REQUEST, 0, "SUSPENDED"), (REQUEST, 0, ""),
        (REQUEST, 0, "WAITING_FOR_RESOURCES"), (REQUEST, 0, "ACTIVE"), (VM, 0, "CREATING"),
        *READY,
    )  # fmt: skip
    done = checkout.run("launch/tpu.sh", "create", *TPU)
    assert done.returncode == 0, done.stderr
    assert gcloud(checkout) == [
        "request?", "delete", "request?", "create", "request?", "request?", "tpu?", "request?", "tpu?"
    ]  # fmt: skip
    assert "my-tpu is WAITING_FOR_RESOURCES; waiting" in done.stdout


def test_tpu_training_that_was_preempted_is_run_again(checkout):
    checkout.answer(
        *READY, ("--command=export", PREEMPTED, ""),  # told to stop, the TPU is still there
        *READY, ("--command=export", 255, ""), (REQUEST, 0, "ACTIVE"), (VM, 0, "PREEMPTED"),
        (REQUEST, 0, "SUSPENDED"), *NEW,
    )  # fmt: skip
    done = checkout.run("launch/tpu.sh", "run", *TPU, "--", *ON_TPU)
    assert done.returncode == 0, done.stderr
    there = ["request?", "tpu?"]
    assert gcloud(checkout) == [
        *there, *SETUP, "train", *there, *SETUP, "train", *there,
        "request?", "delete", "request?", "create", *there, *SETUP, "train",
    ]  # fmt: skip


@pytest.mark.parametrize("status, tries", [(2, 1), (1, 1), (130, 1), (PREEMPTED, 3), (255, 3)])
def test_tpu_failures_end_it_and_tries_are_counted(checkout, status, tries):
    checkout.answer(*[*READY, ("--command=export", status, ""), *READY * (status not in (130, PREEMPTED))] * 4)
    done = checkout.run("launch/tpu.sh", "run", *TPU, "--tries", "3", "--", *ON_TPU)
    assert done.returncode == (PREEMPTED if tries > 1 else status)
    assert gcloud(checkout).count("train") == tries


@pytest.mark.parametrize(
    "answers, error",
    [
        ([(REQUEST, 1, "")], "gcloud could not say whether my-tpu is there"),
        ([(REQUEST, 0, ""), ("queued-resources create", 1, "")], "gcloud could not ask for my-tpu"),
        ([(REQUEST, 0, "FAILED")], "my-tpu is FAILED; `gcloud compute tpus queued-resources describe"),
    ],
)
def test_tpu_that_cannot_be_had_ends_it(checkout, answers, error):
    checkout.answer(*answers)
    done = checkout.run("launch/tpu.sh", "run", *TPU, "--", *ON_TPU)
    assert done.returncode == 2 and error in done.stderr


def test_tpu_disk_is_made_once_and_outlives_the_tpu(checkout):
    vm = ["my-tpu", "--zone", "z", "--type", "v6e-8", "--disk", "runs"]
    checkout.answer(("config get-value", 0, "my-project"), *NEW)
    assert checkout.run("launch/tpu.sh", "create", *vm).returncode == 0
    calls = checkout.calls()
    (made,) = [call for call in calls if "disks" in call and "create" in call]
    (create,) = [call for call in calls if "queued-resources" in call and "create" in call]
    assert "--type=hyperdisk-balanced" in made
    assert "--data-disk=source=projects/my-project/zones/z/disks/runs,mode=read-write" in create
    assert "--runtime-version=v2-alpha-tpuv6e" in create and "--spot" not in create
    checkout.answer(("disks list", 0, "runs"), *NEW)
    assert checkout.run("launch/tpu.sh", "create", *vm, "--project", "p").returncode == 0
    assert gcloud(checkout) == ["request?", "disk?", "create", "request?", "tpu?"]


def test_tpu_delete_of_an_absent_one_is_fine(checkout):
    done = checkout.run("launch/tpu.sh", "delete", "my-tpu", "--zone", "z")
    assert done.returncode == 0 and "my-tpu is not there" in done.stdout
    assert gcloud(checkout) == ["request?"]
    checkout.answer((REQUEST, 0, "SUSPENDED"))
    assert checkout.run("launch/tpu.sh", "delete", "my-tpu", "--zone", "z").returncode == 0
    assert gcloud(checkout) == ["request?", "delete"]


# ---- GKE


def test_gke_manifest_says_what_the_cluster_needs(checkout):
    done = checkout.run("launch/gke.sh", "manifest", *GKE, "--spot", "--tries", "9", "--", *ON_GKE)
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert jobset["metadata"]["name"] == "paper"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 8
    assert policy["rules"] == [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "host/miracle:1" and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    # Kubernetes reads $(NAME) in a command as a variable, and $$(NAME) as $(NAME).
    command = [word.replace("$$(", "$(") for word in container["command"]]
    assert command == [".venv/bin/python", "-m", "miracle_jax.train", *ON_GKE]
    assert "$$(date)" in container["command"][-1]
    on_demand = yaml.safe_load(checkout.run("launch/gke.sh", "manifest", *GKE, "--", *ON_GKE).stdout)
    selector = on_demand["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert "cloud.google.com/gke-spot" not in selector and len(selector) == 2


@pytest.mark.parametrize("state, deleted", [("", False), ("Failed", True), ("Completed", True)])
def test_gke_run_leaves_a_running_one_alone_and_starts_an_ended_one_again(checkout, state, deleted):
    checkout.answer(("get jobset", 0, state))
    done = checkout.run("launch/gke.sh", "run", *GKE, "--namespace", "me", "--", *ON_GKE)
    assert done.returncode == 0, done.stderr
    calls = checkout.calls()
    assert all(call[:2] == ["kubectl", "--namespace=me"] for call in calls)
    assert [call[2] for call in calls] == ["get", *["delete"] * deleted, "apply"]
    applied = (checkout.fakes / "given").read_text()
    assert applied == checkout.run("launch/gke.sh", "manifest", *GKE, "--", *ON_GKE).stdout


def test_gke_failure_to_reach_the_cluster_ends_it(checkout):
    checkout.answer(("get jobset", 1, ""))
    assert checkout.run("launch/gke.sh", "run", *GKE, "--", *ON_GKE).returncode == 1
    assert [call[1] for call in checkout.calls()] == ["get"]


def test_gke_image_is_built_from_the_files_of_head(checkout):
    checkout.answer(("git archive", 0, "the files"))
    assert checkout.run("launch/gke.sh", "image", "paper", "--image", "host/miracle:1").returncode == 0
    calls = {call[0] + " " + call[1]: call for call in checkout.calls()}
    assert calls["git archive"][2:] == ["HEAD"]
    assert (checkout.fakes / "given").read_text() == "the files\n"
    assert calls["docker build"][2:] == ["--tag=host/miracle:1", "--file=launch/Dockerfile", "-"]
    assert calls["docker push"][2:] == ["host/miracle:1"]
    assert "bash launch/setup.sh tpu" in (ROOT / "launch" / "Dockerfile").read_text()
