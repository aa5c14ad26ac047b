"""A language model told in words which personality to answer with: what there is to beat (the paper's Table 3).

    export OPENAI_API_KEY=...
    python -m miracle_jax.prompting --endpoint URL --model NAME --out FOLDER [--data test] [--per-personality 20]
    python -m miracle_jax.evaluate runs/tiny --predictions NAME=FOLDER/replies.jsonl [--per-personality 20]

The wanted aspects are described as they are where dialogues are collected (instructions.py), and the context is given
as a chat. Each answer is in FOLDER/answers.jsonl as soon as it is whole, and the same command goes on from there;
replies.jsonl, in the format of predictions.py, appears when every context has been answered.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miracle_jax import asking, storage, systems
from miracle_jax.attributes import Schema
from miracle_jax.command_line import parse
from miracle_jax.endpoint import Endpoint, Job, Settings
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.instructions import Instructions
from miracle_jax.journal import DONE, read_journal
from miracle_jax.predictions import LONGEST_REPLY

SETTINGS, JOURNAL, REPLIES = "prompting.json", "answers.jsonl", "replies.jsonl"
"""Files of the folder."""


@dataclass(frozen=True)
class Options(Settings):
    """What is answered, and where the answers go."""

    data: str = "test"
    """JSONL file with references, whose `tag` labels attributes. `test` is the bundled test set."""
    per_personality: int = 0
    """Contexts of each personality, drawn as evaluate draws them with the same --seed. 0: all of the file."""
    personality: Literal["labelled", "all"] = "labelled"
    """`labelled`: what each line's `tag` says; `all`: every combination, for evaluate's --counterfactual."""
    schema: str = ""
    """TOML file of the attributes and the descriptions of their aspects. Empty: the paper's three."""
    give_up: bool = False
    """Leaves the replies to contexts that have failed empty, which counts against the model."""
    out: str = ""
    """Folder for the answers."""


def messages(instructions: Instructions, task: dict) -> list[dict[str, str]]:
    """The chat that a task is put as: what personality is wanted, the turns so far, the last question.

    task: as `generate.task_of` gives it.
    """
    chat = [{"role": "system", "content": instructions.reply(instructions.schema.parse(task["personality"]))}]
    for i, question in enumerate(task["input"]):
        chat.append({"role": "user", "content": question})
        chat += [{"role": "assistant", "content": reply} for reply in task["output"][i : i + 1]]
    return chat


def check(reply: str) -> None:
    """Raises ValueError for what `evaluate` would not score."""
    if len(reply) > LONGEST_REPLY:
        raise ValueError(f"the reply has more than {LONGEST_REPLY:,} characters")


def tasks_of(options: Options, schema: Schema) -> list[dict]:
    """What is to be answered, in the order of the test set."""
    test = systems.read_test_set(options.data, schema, options.per_personality, options.seed)
    if options.personality == "labelled":
        return test.tasks(test.labels, list(test.chosen))
    ids, rows = systems.everything(test)
    return test.tasks(rows, ids)


def answer(options: Options) -> asking.Totals:
    """Asks for the answers that are not there yet, and writes all of them when they are. Raises UserError where that
    has to stop."""
    if not options.out or storage.is_remote(options.out):
        raise UserError("name the local folder for the answers: --out FOLDER")
    endpoint, folder = Endpoint(options), Path(options.out).expanduser()
    instructions = Instructions.load(options.schema)
    tasks = tasks_of(options, instructions.schema)
    by_id = {f"{task['id']}/{task['personality']}": task for task in tasks}
    chats = {i: messages(instructions, task) for i, task in by_id.items()}
    jobs = (Job(i, chat, check) for i, chat in chats.items())
    facts = asking.facts(options) | {
        "data": options.data, "personality": options.personality, "per_personality": options.per_personality,
        "asked": hashlib.sha256(json.dumps([*chats.values()]).encode()).hexdigest(),
    }  # fmt: skip
    with storage.locked(folder, "--out"):
        asking.pin(folder / SETTINGS, facts, folder / JOURNAL)
        totals = asking.run(endpoint, jobs, len(by_id), folder / JOURNAL)
        if len(totals.done) + len(totals.failed) * options.give_up == totals.number:
            _write(folder, by_id)
        return totals


def _write(folder: Path, tasks: dict[str, dict[str, Any]]) -> None:
    done = (record for record in read_journal(folder / JOURNAL) if record["status"] == DONE)
    replies = {record["id"]: record["text"].strip() for record in done}
    path = folder / REPLIES
    with storage.disk_errors(str(path), "all answers are kept"), storage.replacing(path) as file:
        for i, task in tasks.items():
            line = {name: task[name] for name in ("id", "input", "output", "personality")}
            line["reply"] = replies.get(i, "")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        argv = sys.argv[1:] if argv is None else argv
        options = parse(Options(), argv, "python -m miracle_jax.prompting", __doc__)
        totals = answer(options)
        print(totals)
        replies = Path(options.out) / REPLIES
        failed = len(totals.failed)
        if left := totals.number - len(totals.done) - failed * options.give_up:
            raise UserError(
                f"{left:,} contexts have no answer, so {replies} is not written; run the command again, with --again "
                "failed for those that failed, or with --give-up True to leave their replies empty"
            )
        print(f"wrote {replies}" + f", {failed:,} of its replies empty" * bool(failed))
        print(f"score it: python -m miracle_jax.evaluate RUN --predictions NAME={replies}")


if __name__ == "__main__":
    main()
