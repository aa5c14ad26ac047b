"""What is in a dataset and what the model will see of it, for people: `python -m miracle_jax.dataset`."""

from collections.abc import Sequence

import numpy as np

from miracle_jax import dataset, dialogues, pipeline
from miracle_jax.attributes import UNKNOWN, Schema
from miracle_jax.config import Config
from miracle_jax.examples import Examples, Limits, TokenisedDialogues
from miracle_jax.tokenizers import Tokenizers, load_or_train

BARS = 12
"""Most rows of a histogram."""
NO_LABEL = "no label"
UNLIMITED = (2**30, 2**30, 2**30)


def describe(config: Config) -> str:
    """Figures, lengths and one example of the data that a config names."""
    train_files, validation_files, schema = dataset.sources(config.data)
    splits = [files for files in (train_files, validation_files) if files]
    train, *others = dialogues.build_all(splits, schema, config.data.cache, config.data.on_error)
    instances = train.read(range(len(train)))
    held_out = [i for validation in others for i in validation.read(range(len(validation)))]
    tokenizers = load_or_train(config, (turn for i in instances for turn in (*i.questions, *i.replies)))
    limits, settings = config.data.buckets[-1], config.train
    uncut = TokenisedDialogues(train, tokenizers, UNLIMITED).lengths
    examples = TokenisedDialogues(train, tokenizers, limits, config.decoder)
    batches = pipeline.Batches(
        examples, config.data.buckets, settings.batch_size, settings.accumulate, config.seed,
        shares=1 if config.data.pack else 0,
    )  # fmt: skip
    return "\n\n".join(
        [
            "Dialogues (train/validation)\n" + table7(instances, held_out, schema),
            "Instances (train/validation)\n" + aspect_table(instances, held_out, schema),
            "Lengths of the training instances in tokens, before cutting\n" + histograms(uncut, limits),
            f"Batches of {settings.batch_size} instances, {batches.steps_per_epoch} steps an epoch\n"
            + bucket_table(batches)
            + f"\npadding: {batches.padding_fraction:.1%} of the tokens of an epoch, on one device",
            "One example, as encoder and decoder see it\n" + example(instances, examples, tokenizers, schema),
        ]
    )


def labelled(instances: Sequence[dataset.Instance], attribute: int | None) -> list[dataset.Instance]:
    """Those that are labelled for an attribute; None: those without a label."""
    if attribute is None:
        return [i for i in instances if set(i.labels) == {UNKNOWN}]
    return [i for i in instances if i.labels[attribute] != UNKNOWN]


def count_dialogues(instances: Sequence[dataset.Instance], attribute: int | None) -> tuple[int, int, float]:
    """Dialogues, turns (a question with its reply) and mean words of a reply, as in the paper's Table 7.

    Of the instances that are `labelled` so. An instance holds its dialogue up to one turn; a dialogue is what no other
    instance continues, and a turn that several instances repeat counts once.
    """
    paths = {
        (i.topic, i.labels, tuple(zip(i.questions, i.replies, strict=True))) for i in labelled(instances, attribute)
    }
    turns = {(topic, labels, path[:n]) for topic, labels, path in paths for n in range(1, len(path) + 1)}
    continued = {(topic, labels, path[:-1]) for topic, labels, path in turns}
    words = [len(path[-1][1].split()) for _, _, path in turns]
    return len(paths - continued), len(turns), float(np.mean(words)) if words else 0.0


def table7(train: Sequence[dataset.Instance], validation: Sequence[dataset.Instance], schema: Schema) -> str:
    """The columns of the paper's Table 7, one row an attribute, and one for instances without a label, if any."""
    rows = [("dataset", "dialogues", "turns", "avg. words")]
    without = [(None, NO_LABEL)] * any(labelled(part, None) for part in (train, validation))
    for attribute, name in [*enumerate(schema.names), *without]:
        a, b = count_dialogues(train, attribute), count_dialogues(validation, attribute)
        rows.append((name.replace("_", " "), f"{a[0]:,}/{b[0]:,}", f"{a[1]:,}/{b[1]:,}", f"{a[2]:.2f}/{b[2]:.2f}"))
    return _columns(rows)


def aspect_table(train: Sequence[dataset.Instance], validation: Sequence[dataset.Instance], schema: Schema) -> str:
    """Instances of every aspect, and those without a label, if any."""
    rows = [("attribute", "id", "aspect", "instances")]
    for index, attribute in enumerate(schema.attributes):
        for aspect, name in enumerate(attribute.aspects):
            counts = (sum(i.labels[index] == aspect for i in part) for part in (train, validation))
            shown = "/".join(f"{count:,}" for count in counts)
            rows.append((attribute.name.replace("_", " "), str(aspect), name, shown))
    without = [len(labelled(part, None)) for part in (train, validation)]
    if any(without):
        rows.append((NO_LABEL, "", "", "/".join(f"{count:,}" for count in without)))
    return _columns(rows)


def histograms(lengths: np.ndarray, limits: Limits) -> str:
    """lengths: (N, 3), of context, context + reply, and reply."""
    parts = []
    names = ("context (encoder; its oldest turns give way)", "context + reply (encoder; the context gives way)",
             "reply (decoder; its end gives way)")  # fmt: skip
    for column, name, limit in zip(lengths.T, names, limits, strict=True):
        width = max(-(-int(column.max()) // BARS), 1)
        width = -(-width // 4) * 4  # edges that are easy to read
        counts = np.bincount((column - 1) // width)
        cut = int(np.sum(column > limit))
        parts.append(
            f"{name}: median {np.median(column):.0f}, 99 % {np.percentile(column, 99):.0f}, longest {column.max()}, "
            f"over the limit of {limit}: {cut:,}"
        )
        for i, count in enumerate(counts):
            bar = "#" * round(40 * count / counts.max())
            parts.append(f"  {i * width + 1:5} - {(i + 1) * width:5}  {count:7,}  {bar}".rstrip())
    return "\n".join(parts)


def bucket_table(batches: pipeline.Batches) -> str:
    """How many instances need each bucket and how many steps of the first epoch have it."""
    needed = np.bincount(batches.bucket_of, minlength=len(batches.buckets))
    taken = [batches.bucket(step) for step in range(batches.steps_per_epoch)]
    rows = [("bucket", "context", "joint", "reply", "instances", "steps")]
    for i, bucket in enumerate(batches.buckets):
        rows.append((str(i), *map(str, bucket), f"{needed[i]:,}", f"{taken.count(bucket):,}"))
    return _columns(rows)


def example(instances: Sequence[dataset.Instance], examples: Examples, tokenizers: Tokenizers, schema: Schema) -> str:
    """The decoded tokens of the first instance that has an earlier turn."""
    chosen = next((n for n, i in enumerate(instances) if len(i.questions) == 2), 0)
    context, joint, reply, *prompt = (ids.tolist() for ids in examples.tokens([chosen])[0])
    seen = [f"\nbefore it, {len(ids)} tokens: {tokenizers.decoder.decode(ids, specials=True)!r}" for ids in prompt]
    return (
        f"personality: {schema.describe(instances[chosen].labels) or 'not known'}\n"
        f"prior encoder, {len(context)} tokens: {tokenizers.encoder.decode(context)}\n"
        f"posterior encoder, {len(joint)} tokens: {tokenizers.encoder.decode(joint)}\n"
        f"decoder, {len(reply)} tokens: {tokenizers.decoder.decode(reply, specials=True)}{''.join(seen)}"
    )


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  " + "  ".join(row).rstrip() for row in aligned)
