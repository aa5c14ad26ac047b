"""Answers with a chosen personality: one context, a whole file, or a conversation in the terminal.

    python -m miracle_jax.generate runs/tiny "How was your day?" --personality "lyrical, optimistic"
    python -m miracle_jax.generate runs/tiny --data contexts.jsonl --out replies.jsonl --personality all
    python -m miracle_jax.generate runs/tiny

The last is a conversation; /help in it lists its commands.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
from tqdm import tqdm

from miracle_jax import cluster, config, dataset, reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.command_line import read_options
from miracle_jax.errors import UserError, one_sentence, printable
from miracle_jax.model import Model, Reply, load

log = logging.getLogger("miracle_jax")

CHUNK = 256  # contexts between two lines of progress; also the unit in which an interrupted run resumes


@dataclass(frozen=True)
class Options:
    """What to answer, and how."""

    personality: str = ""
    """Aspects by name ("lyrical, critical"; those left out are not controlled), `all` for every combination, or
    `labelled` for what each line of --data is labelled with. Empty: `labelled` with --data, else none."""
    weight: tuple[str, ...] = ()
    """Energy weight of attributes, `attitude=2` each; others have sample.weight."""
    samples: int = 1
    """Latents drawn a context; the one of lowest energy is kept."""
    seed: int = 0
    """Of the draws: latents with `samples` or sample.start draw, text with decode.temperature."""
    data: str = ""
    """JSONL file of contexts: `input` (M questions), `output` (M - 1 replies, or M: the last is the reference),
    optional `tag`, `personas`, `id`; `attribute=FILE` where `tag` is an aspect of that attribute. `test` is the bundled
    test set."""
    out: str = ""
    """JSONL file for the replies; one that exists is replaced. Empty: they are printed."""
    limit: int = 0
    """Answer this many contexts, spread evenly over the file. 0: all."""
    sample: config.Sample = field(default_factory=config.Sample)
    decode: config.Decode = field(default_factory=config.Decode)


def contexts_to_answer(schema: Schema, options: Options) -> list[dict]:
    """One task a reply, as `task_of` gives it, in the order of the file."""
    files = dataset.labelled_source(options.data, schema)
    instances = list(enumerate(dataset.read_files(files, schema, reference_required=False)))
    unlabelled = sum(max(instance.labels) < 0 for _, instance in instances)
    if unlabelled and options.personality == "labelled":
        log.warning("%d of %d contexts have no `tag`; their replies are not controlled", unlabelled, len(instances))
    if options.limit and options.limit < len(instances):
        instances = [instances[i * len(instances) // options.limit] for i in range(options.limit)]
    tasks = []
    for number, instance in instances:
        wanted = {
            "": [instance.labels], "labelled": [instance.labels], "all": schema.personalities()
        }.get(options.personality) or [schema.parse(options.personality)]  # fmt: skip
        tasks += [task_of(number, instance, schema.describe(aspects)) for aspects in wanted]
    return tasks


def task_of(number: int, instance: dataset.Instance, personality: str) -> dict:
    """A context to answer: {"id", "input", "output", "reference", "personality"}.

    number: the instance's place in its file, its id where it has none.
    """
    asked = len(instance.questions)
    return {
        "id": instance.id or str(number),
        "input": list(instance.questions),
        "output": list(instance.replies[: asked - 1]),
        "reference": instance.replies[asked - 1] if len(instance.replies) == asked else None,
        "personality": personality,
    }


def answer_all(model: Model, tasks: list[dict], options: Options, weights: dict[str, float], start: int = 0):
    """Yields a record a task, from task `start` (a multiple of CHUNK) on; on the first process, while all answer. What
    is drawn depends on the seed and on a task's number alone, and every device answers whole chunks, so what is written
    depends neither on the devices nor on interruptions (on CPUs, while as many cores may be used)."""
    replicas = {device: model.on(device) for device in jax.local_devices()}

    def answer(device, first):
        chunk = tasks[first : first + CHUNK]
        with jax.default_device(device):
            replies = replicas[device].replies(
                chunk, [task["personality"] for task in chunk], weights=weights, samples=options.samples,
                seed=options.seed, first=first, sample=options.sample, decode=options.decode,
            )  # fmt: skip
        return [record(task, reply) for task, reply in zip(chunk, replies, strict=True)]

    shown = cluster.first() and sys.stderr.isatty()
    with tqdm(total=len(tasks), initial=start, unit="reply", disable=not shown) as bar:
        for records in cluster.spread(range(start, len(tasks), CHUNK), answer):
            yield records
            bar.update(len(records))


def record(task: dict, reply: Reply) -> dict:
    """A line of the output file."""
    facts = dataclasses.asdict(reply)
    return task | {"reply": facts.pop("text")} | facts


def digest(model: Model, tasks: list[dict], options: Options, weights: dict[str, float]) -> str:
    """A name made from all that decides the replies."""
    settings = dataclasses.asdict(dataclasses.replace(options, out=""))
    asked = [tasks, settings, weights, str(model.config), model.default_heads, model.fingerprint()]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def write_file(model: Model, tasks: list[dict], options: Options, weights: dict[str, float]) -> int:
    """Writes options.out. It appears when it is complete; until then a part file beside it, which the same command
    resumes, holds what is done. Of several processes the first writes, and all answer.

    Returns how many replies it wrote itself."""
    out = storage.local_file(options.out)
    if not cluster.first():
        for _ in answer_all(model, tasks, options, weights, start=cluster.tell(None)):
            pass
        return 0
    part = out.with_name(f".{out.name}.{digest(model, tasks, options, weights)}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    done, size = _done(part, tasks)
    if done:
        print(f"resuming after {done} replies", file=sys.stderr)
    with part.open("ab") as file:
        file.truncate(size)
        for records in answer_all(model, tasks, options, weights, start=cluster.tell(done)):
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records).encode())
            file.flush()
            os.fsync(file.fileno())
    part.replace(out)
    print(f"wrote {len(tasks)} replies to {out}", file=sys.stderr)
    return len(tasks) - done


def _done(part: Path, tasks: list[dict]) -> tuple[int, int]:
    """How many replies a part file holds, in whole chunks, and in how many bytes. What was cut short, or is not the
    answer to its task (some file systems leave zeros after a power cut), is written again, with all behind it."""
    ends = [0]  # of the lines
    with contextlib.suppress(FileNotFoundError, UserError), part.open("rb") as file:
        for task, line in zip(tasks, file, strict=False):
            answered = reading.parse_object(line)
            if not line.endswith(b"\n") or any(answered.get(name) != value for name, value in task.items()):
                break
            ends.append(ends[-1] + len(line))
    whole = (len(ends) - 1) // CHUNK * CHUNK
    return whole, ends[whole]


def show(reply: Reply) -> str:
    """A reply with what the model knows about it, for the terminal."""
    parts = []
    for attribute, probabilities in reply.aspects.items():
        aspect = max(probabilities, key=probabilities.get)
        parts.append(f"{attribute.replace('_', ' ')}: {aspect} {probabilities[aspect]:.0%}")
    state = "ok" if reply.ok else "NOT ok: " + ("it did not arrive" if math.isfinite(reply.energy) else "not finite")
    asked = reply.personality or "no personality"
    return (
        f"{reply.text}\n    [{asked}]  {'  '.join(parts)}  energy {reply.energy_before:.2f} -> {reply.energy:.2f}  "
        f"{reply.steps} steps  {state}"
    )


def converse(model: Model, options: Options, weights: dict[str, float]) -> None:
    """A conversation in the terminal. The personality can change at any turn."""
    turns: list[str] = []
    personality, samples = options.personality, options.samples
    model.schema.parse(personality)
    print("Type a question. /help lists the commands, /quit ends.")
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("this line is not UTF-8; write it again, or set the terminal to UTF-8")
            continue
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if not line:
                continue
            elif command == "/quit":
                return
            elif command == "/help":
                print(_help(model))
            elif command == "/personality":
                personality = model.schema.describe(model.schema.parse(rest))
                print(f"personality: {personality or 'none'}")
            elif command == "/weight":
                weights = weights | parse_weights(["=".join(rest.rsplit(maxsplit=1))], model)
                print("weights: " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items()))
            elif command == "/samples":
                if not rest.isdecimal() or int(rest) < 1:
                    raise UserError(f"/samples takes a number of latents, at least 1, not {rest!r}")
                samples = int(rest)
                print(f"samples: {samples}")
            elif command == "/reset":
                turns = []
                print("the conversation starts anew")
            elif line.startswith("/"):
                raise UserError(f"there is no command {command}; /help lists them")
            else:
                reply = model.reply(
                    [*turns, line], personality, weights=weights, samples=samples, seed=options.seed,
                    first=len(turns) // 2, sample=options.sample, decode=options.decode,
                )  # fmt: skip
                # A reply without a word cannot be part of a context.
                turns = [*turns, line, reply.text] if reply.text else turns
                print(show(reply))
        except UserError as error:
            print(error)


def _help(model: Model) -> str:
    names = "; ".join(f"{a.name.replace('_', ' ')}: {' or '.join(a.aspects)}" for a in model.schema.attributes)
    return (
        f"/personality plain, pessimistic   which aspects to speak with ({names}); nothing after it: none\n"
        "/weight attitude 2                how strongly an attribute pulls (0: not at all)\n"
        "/samples 8                        latents drawn a reply; the one of lowest energy speaks\n"
        "/reset                            forget the conversation\n"
        "/quit                             end"
    )


def parse_weights(items, model: Model) -> dict[str, float]:
    """["attitude=2"] -> {"attitude": 2.0}; unknown attributes and what is not a weight raise UserError."""
    weights = {}
    for item in items:
        name, _, value = item.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(
                f"weight {item!r} is not of the form attribute=number with a finite number, at least 0; for instance "
                f"{model.schema.names[0]}=2"
            )
        weights[model.schema.names[model.schema.attribute_index(name.strip())]] = weight
    return weights


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        argv = cluster.join(argv)
        workdir, turns, options = read_options(
            "python -m miracle_jax.generate", __doc__ + cluster.HELP, "[QUESTION [REPLY QUESTION ...]]",
            lambda run: Options(sample=run.sample, decode=run.decode), argv,
        )  # fmt: skip
        if options.samples < 1 or options.limit < 0:
            raise UserError("--samples must be at least 1 and --limit at least 0")
        if options.data and turns:
            raise UserError("give either a context or --data, not both")
        if not options.data:
            if options.out:
                raise UserError("--out is where the replies to --data go; name a file of contexts with --data")
            if options.limit:
                raise UserError("--limit is how many contexts of --data are answered; name a file of contexts with it")
            if options.personality == "labelled":
                raise UserError("--personality labelled takes the labels of --data; without it name aspects")
        if options.personality == "all" and not (options.data or turns):
            raise UserError(
                "--personality all answers a context or --data; a conversation has one personality at a time"
            )
        if cluster.size() > 1 and not (options.data or turns):
            raise UserError(f"a conversation takes one process, not {cluster.size()}; name contexts with --data")
        if options.out:
            out = storage.local_file(options.out)
            data = Path(options.data.partition("=")[2] or options.data).expanduser()
            if out.exists() and data.exists() and out.samefile(data):
                raise UserError(f"--out {options.out} is the file of contexts itself; name another")
        model = load(workdir)
        weights = parse_weights(options.weight, model)
        if options.data:
            tasks = contexts_to_answer(model.schema, options)
            if options.out:
                write_file(model, tasks, options, weights)
            else:
                _print_all(model, tasks, options, weights)
        elif turns:
            named = [options.personality]
            if options.personality == "all":
                named = [model.schema.describe(aspects) for aspects in model.schema.personalities()]
            replies = model.replies(
                [turns] * len(named), named, weights=weights, samples=options.samples, seed=options.seed,
                sample=options.sample, decode=options.decode,
            )  # fmt: skip
            print("\n".join(map(show, replies)))
        else:
            converse(model, options, weights)


def _print_all(model: Model, tasks: list[dict], options: Options, weights: dict[str, float]) -> None:
    previous = None
    for records in answer_all(model, tasks, options, weights):
        for line in records:
            if (line["id"], line["input"]) != previous:
                previous = (line["id"], line["input"])
                print(f"\nUser: {printable(line['input'][-1])}")
            print(f"  {line['personality'] or 'no personality'}: {line['reply']}")


if __name__ == "__main__":
    main()
