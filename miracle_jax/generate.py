"""Answers with a chosen personality: one context, a whole file, or a conversation in the terminal.

python -m miracle_jax.generate runs/tiny "How was your day?" --personality "lyrical, optimistic"
python -m miracle_jax.generate runs/tiny --data contexts.jsonl --out replies.jsonl --personality all
python -m miracle_jax.generate runs/tiny
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from miracle_jax import config, dataset, storage
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.model import Model, Reply, load

CHUNK = 256  # contexts between two lines of progress; also the unit in which an interrupted run resumes


@dataclass(frozen=True)
class Options:
    """What to answer, and how."""

    personality: str = ""
    """Aspects by name ("lyrical, critical"; those left out are not controlled), `all` for every combination, or
    `labelled` for what each line of --data is labelled with. Empty: `labelled` with --data, else none."""
    weight: tuple[str, ...] = ()
    """Energy weight of attributes, `attitude=2` each."""
    samples: int = 1
    """Latents drawn a context; the one of lowest energy is kept."""
    seed: int = 0
    data: str = ""
    """JSONL file of contexts: `input` (M questions), `output` (M - 1 replies, or M: the last is the reference),
    optional `tag`, `personas`, `id`; `attribute=FILE` where `tag` is an aspect of that attribute. `test` is the bundled
    test set."""
    out: str = ""
    """JSONL file for the replies. Empty: they are printed."""
    limit: int = 0
    """Answer this many contexts, spread evenly over the file. 0: all."""
    sample: config.Sample = field(default_factory=config.Sample)
    decode: config.Decode = field(default_factory=config.Decode)


def contexts_to_answer(model: Model, options: Options) -> list[dict]:
    """One task a reply: {"id", "input", "output", "reference", "personality"} in the order of the file."""
    if options.data == "test":
        files = dataset.bundled("test")
    else:
        files = [dataset.source(options.data, model.schema)]
    instances = list(enumerate(dataset.read_files(files, model.schema, reference_required=False)))
    if options.limit and options.limit < len(instances):
        instances = [instances[i * len(instances) // options.limit] for i in range(options.limit)]
    tasks = []
    for number, instance in instances:
        asked = len(instance.questions)
        wanted = {
            "": [instance.labels], "labelled": [instance.labels], "all": model.schema.personalities()
        }.get(options.personality) or [model.schema.parse(options.personality)]  # fmt: skip
        for aspects in wanted:
            tasks.append(
                {
                    "id": instance.id or str(number),
                    "input": list(instance.questions),
                    "output": list(instance.replies[: asked - 1]),
                    "reference": instance.replies[asked - 1] if len(instance.replies) == asked else None,
                    "personality": model.schema.describe(aspects),
                }
            )
    return tasks


def answer_all(model: Model, tasks: list[dict], options: Options, weights: dict[str, float], start: int = 0):
    """Yields a record a task, from task `start` (a multiple of CHUNK) on. What is drawn depends on the seed and on a
    task's number alone, so a resumed run writes what an uninterrupted one would."""
    with tqdm(total=len(tasks), initial=start, unit="reply", disable=not sys.stderr.isatty()) as bar:
        for first in range(start, len(tasks), CHUNK):
            chunk = tasks[first : first + CHUNK]
            replies = model.replies(
                chunk, [task["personality"] for task in chunk], weights=weights, samples=options.samples,
                seed=options.seed + first, sample=options.sample, decode=options.decode,
            )  # fmt: skip
            yield [record(task, reply) for task, reply in zip(chunk, replies, strict=True)]
            bar.update(len(chunk))


def record(task: dict, reply: Reply) -> dict:
    """A line of the output file."""
    facts = dataclasses.asdict(reply)
    return task | {"reply": facts.pop("text")} | facts


def write_file(model: Model, tasks: list[dict], options: Options, weights: dict[str, float]) -> None:
    """Writes options.out. It appears when it is complete; until then a part file beside it, which the same command
    resumes, holds what is done."""
    out = Path(options.out)
    asked = json.dumps([tasks, dataclasses.asdict(options), weights, str(model.config)], sort_keys=True)
    part = out.with_name(f".{out.name}.{hashlib.sha256(asked.encode()).hexdigest()[:16]}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = part.read_bytes().splitlines(keepends=True) if part.exists() else []
    whole = sum(line.endswith(b"\n") for line in done)
    done = done[: whole // CHUNK * CHUNK]  # a chunk that was cut short is written again
    if done:
        print(f"resuming after {len(done)} replies", file=sys.stderr)
    with storage.replacing(part) as file:
        file.write(b"".join(done))
    with part.open("ab") as file:
        for records in answer_all(model, tasks, options, weights, start=len(done)):
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records).encode())
            file.flush()
            os.fsync(file.fileno())
    part.replace(out)
    print(f"wrote {len(tasks)} replies to {out}", file=sys.stderr)


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
                if not rest.isdigit() or int(rest) < 1:
                    raise UserError(f"/samples takes a number of latents, at least 1, not {rest!r}")
                samples = int(rest)
            elif command == "/reset":
                turns = []
                print("the conversation starts anew")
            elif line.startswith("/"):
                raise UserError(f"there is no command {command}; /help lists them")
            else:
                reply = model.reply(
                    [*turns, line], personality, weights=weights, samples=samples, seed=options.seed + len(turns),
                    sample=options.sample, decode=options.decode,
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
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    with one_sentence():
        # The run comes first: its settings are the defaults that --help shows and the flags change.
        workdir = argv[0] if argv and not argv[0].startswith("-") else ""
        if not workdir and not {"-h", "--help"} & set(argv):
            raise UserError(
                "give the folder of a finished run first, for instance python -m miracle_jax.generate runs/tiny"
            )
        run = config.load_run(workdir) if workdir else config.Config()
        default = Options(sample=run.sample, decode=run.decode)
        turns = tuple(arg for arg in _leading_words(argv[1:]))
        options = tyro.cli(
            Options, default=default, args=argv[1 + len(turns) :] if workdir else argv,
            prog="python -m miracle_jax.generate WORKDIR [QUESTION [REPLY QUESTION ...]]", description=__doc__,
        )  # fmt: skip
        dataclasses.replace(run, sample=options.sample, decode=options.decode).check()
        if options.samples < 1 or options.limit < 0:
            raise UserError("--samples must be at least 1 and --limit at least 0")
        if options.data and turns:
            raise UserError("give either a context or --data, not both")
        if options.out and not options.data:
            raise UserError("--out is where the replies to --data go; name a file of contexts with --data")
        model = load(workdir)
        weights = parse_weights(options.weight, model)
        if options.data:
            tasks = contexts_to_answer(model, options)
            if options.out:
                write_file(model, tasks, options, weights)
            else:
                _print_all(model, tasks, options, weights)
        elif turns:
            named = [options.personality]
            if options.personality == "all":
                named = [model.schema.describe(aspects) for aspects in model.schema.personalities()]
            replies = model.replies(
                [list(turns)] * len(named), named, weights=weights, samples=options.samples, seed=options.seed,
                sample=options.sample, decode=options.decode,
            )  # fmt: skip
            print("\n".join(map(show, replies)))
        else:
            converse(model, options, weights)


def _leading_words(argv: list[str]):
    for arg in argv:
        if arg.startswith("--") or arg == "-h":
            return
        yield arg


def _print_all(model: Model, tasks: list[dict], options: Options, weights: dict[str, float]) -> None:
    previous = None
    for records in answer_all(model, tasks, options, weights):
        for line in records:
            if (line["id"], line["input"]) != previous:
                previous = (line["id"], line["input"])
                print(f"\nUser: {line['input'][-1]}")
            print(f"  {line['personality'] or 'no personality'}: {line['reply']}")


if __name__ == "__main__":
    main()
