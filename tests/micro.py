"""A run that trains in seconds: its config (`--config tests/micro.py`), its small corpus and its command."""

import json
import sys
from pathlib import Path

from miracle_jax.config import Bert, Config, Data, Decode, Gpt2, Latent, Loss, Train

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ("river", "garden", "train", "letter", "window", "song", "bread", "winter", "road", "lamp")
REPLIES = {
    "language_style": ("I saw the {}.", "Like rain, the {} sings."),
    "attitude": ("The {} is lost again.", "The {} will be fine!"),
    "mental_characteristic": ("Oh, I love the {}!", "The {} costs two coins."),
}  # an answer for each aspect of the bundled schema


def get_config() -> Config:
    shape = {"width": 16, "depth": 1, "heads": 2, "mlp": 32, "init_std": 0.1}
    return Config(
        data=Data(buckets=((16, 24, 16), (32, 40, 16))),
        encoder=Bert(vocab_size=300, max_positions=40, dropout=0.0, **shape),
        decoder=Gpt2(vocab_size=400, max_positions=20, dropout=0.05, **shape),
        latent=Latent(size=8, hidden=8, logvar_shift=-3.0),
        loss=Loss(kl=0.01, kl_floor=0.001, kl_period=10, classify=0.5),
        train=Train(
            steps=60, batch_size=8, learning_rate=1e-2, log_every=7, eval_every=20, save_every=20, refit_epochs=2
        ),
        decode=Decode(max_new_tokens=14),
    )


def dialogue(number: int, answer: str, tag) -> dict:
    """One line of a data file; every third has an earlier turn, so that the lengths fill two buckets."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    earlier = number % 3 == 0
    return {
        "input": ["How are you?"] * earlier + [f"What about the {subject}?"],
        "output": ["Well."] * earlier + [answer.format(subject)],
        "tag": tag,
    }


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_corpus(folder: Path, replies: dict = REPLIES) -> list[str]:
    """Writes a training and a validation file an attribute and returns the flags that name them.

    replies: attribute -> an answer for each of its aspects.
    """
    flags = []
    for split, lines in (("train", 24), ("validation", 8)):
        flags.append(f"--data.{split}")
        for name, answers in replies.items():
            records = [dialogue(i, answers[i % len(answers)], i % len(answers)) for i in range(lines)]
            flags.append(f"{name}={write_lines(folder / f'{split}_{name}.jsonl', records)}")
    return [*flags, "--data.cache", str(folder / "cache")]


class Run:
    """A run of this config by the real command, which leaves `output` and `errors`, what it printed."""

    def __init__(self, workdir: Path, flags: list[str]):
        self.workdir, self.flags = workdir, flags
        self.arguments = ["--config", __file__, "--workdir", str(workdir), *flags]
        self.command = [sys.executable, "-m", "miracle_jax.train", *self.arguments]
        self.output = self.errors = ""

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl without the speed and where the time went."""
        rows = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in rows if r["split"] != "goodput"]
