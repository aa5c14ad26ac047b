"""Dialogues to batches: tokenised, bucketed by length, stratified over the attributes, split over processes.

A batch is a dict of numpy arrays. Axis letters: G micro-batches of a step, B instances, S tokens, A attributes.

    context (G, B, S)  [CLS] context [SEP]              context_length (G, B)
    joint   (G, B, S)  [CLS] context reply [SEP]        joint_length   (G, B)
    reply   (G, B, S)  <bos> reply <eos>                reply_length   (G, B)
    prompt  (G, B, S)  context, for the decoder         prompt_length  (G, B)
    labels  (G, B, A)  aspect ids, -1 where unknown

all int32, each S that of the step's bucket. Behind its length a row is filled with padding (`reply` with <eos>); in
front of it where it is a prompt, so that the reply follows at once. There are prompts where decoder.sees_context is
set; they are as wide as the longest of the instances in the bucket and those below it.

Where training packs the tokens of a micro-batch end to end (packing.py), context_tokens, joint_tokens and reply_tokens
(G, W, U) say where they are, for each of the W shares of its rows.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from miracle_jax import dataset, dialogues, examples
from miracle_jax.attributes import UNKNOWN
from miracle_jax.config import Config
from miracle_jax.errors import UserError
from miracle_jax.examples import FIELDS, PROMPT, Corpus, Examples, Limits, TokenArrays, TokenisedDialogues
from miracle_jax.tokenizers import Tokenizers, load_or_train

READ_TOGETHER = 64
"""Texts that `by_length` hands over at a time."""
LOOKED_AT, EPOCHS = 4000, 200
"""How much room packed tokens need is seen in the epochs of so many steps, so many epochs at most."""
ROUND, SPARE, WORTH = 16, 128, 0.9
"""The room is a multiple of ROUND and has one place in SPARE of the bucket's to spare: in 30 later epochs of the
bundled corpus no step of 16 or 64 needed more, 1 of 5,460 of 32 on 8 devices did. Nothing is packed where the room
would be more than WORTH of the bucket."""


def prepare(config: Config, tokenizers: Tokenizers | None = None) -> Corpus:
    """The corpus that `config.data` names, built and indexed unless it is in the cache.

    tokenizers: those of a run that is resumed; None loads or trains them.
    """
    if config.data.frozen:
        corpus = examples.load_frozen(config.data.frozen)
        corpus.tokenizers.check(config)
        _check_prompts(corpus, config)
        return corpus
    train_files, validation_files, schema = dataset.sources(config.data)
    if not validation_files:
        raise UserError(
            "data.train is given but data.validation is not, and checkpoints are chosen by validation; name files for "
            f"it, for instance --data.validation {schema.names[0]}=FILE.jsonl"
        )
    splits = (train_files, validation_files)
    train, validation = dialogues.build_all(splits, schema, config.data.cache, config.data.on_error)
    if tokenizers is None:
        turns = (turn for i in train.read(range(len(train))) for turn in (*i.questions, *i.replies))
        tokenizers = load_or_train(config, turns)
    tokenizers.check(config)
    limits = config.data.buckets[-1]
    key = f"{train.folder.name} {validation.folder.name} {examples.tokenizers_key(tokenizers)}"
    return Corpus(
        schema=schema,
        tokenizers=tokenizers,
        train=TokenisedDialogues(train, tokenizers, limits, config.decoder),
        validation=TokenisedDialogues(validation, tokenizers, limits, config.decoder),
        key=hashlib.sha256(key.encode()).hexdigest()[:20],
    )


def _check_prompts(corpus: Corpus, config: Config) -> None:
    """Raises UserError unless frozen tokens hold what the decoder sees of the contexts."""
    lengths = np.concatenate([corpus.train.lengths, corpus.validation.lengths])[:, len(FIELDS) :]
    limit = config.decoder.prompt_limit
    if bool(lengths.size) != config.decoder.sees_context or lengths.max(initial=0) > limit:
        held = f"prompts of up to {lengths.max()} tokens" if lengths.size else "no prompts"
        raise UserError(
            f"{config.data.frozen} holds {held}, but the decoder sees {limit} tokens of the context; freeze "
            f"the data again with --decoder.sees-context {config.decoder.sees_context} --decoder.context-tokens "
            f"{config.decoder.context_tokens}"
        )


def assign_buckets(lengths: np.ndarray, buckets: Sequence[Limits]) -> np.ndarray:
    """(N,) index of the smallest bucket that holds each instance. Raises UserError when the last does not."""
    lengths = lengths[:, : len(FIELDS)]
    fits = np.all(lengths[:, None, :] <= np.array(buckets)[None], axis=-1)
    if not fits[:, -1].all():
        longest = tuple(lengths.max(axis=0).tolist())
        raise UserError(
            f"the tokens are up to {longest} long (context, context + reply, reply), but the last of data.buckets is "
            f"{tuple(buckets[-1])}; freeze the data again for these buckets or raise the last one"
        )
    return np.argmax(fits, axis=1)


def widths_of(examples: Examples, bucket_of: np.ndarray, buckets: Sequence[Limits]) -> list[tuple[int, ...]]:
    """For each bucket the widths of the fields that the examples have: its own, and its prompts'."""
    if examples.lengths.shape[1] == len(FIELDS):
        return list(buckets)
    longest = [examples.lengths[bucket_of <= b, 3].max(initial=1) for b in range(len(buckets))]
    return [(*bucket, -(-int(width) // 8) * 8) for bucket, width in zip(buckets, longest, strict=True)]


def collate(
    examples: Examples, indices: np.ndarray, widths: Sequence[int], columns: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The instances as arrays of these widths.

    indices: any shape, which leads the arrays' shapes. columns: name -> (N, ...), what a batch shall hold besides.
    """
    flat = indices.ravel().tolist()
    rows = examples.tokens(flat)
    batch = {}
    for field, (name, width) in enumerate(zip((*FIELDS, PROMPT), widths, strict=False)):
        if f"{name}_mean" in (columns or {}):  # frozen encoders have read these texts
            continue
        array = np.full((len(flat), width), examples.padding[field], np.int32)
        for i, row in enumerate(rows):
            start = width - len(row[field]) if name == PROMPT else 0
            array[i, start : start + len(row[field])] = row[field]
        batch[name] = array.reshape(*indices.shape, width)
        batch[f"{name}_length"] = examples.lengths[indices, field]
    batch["labels"] = examples.labels[indices]
    return batch | {name: column[indices] for name, column in (columns or {}).items()}


class Batches:
    """The training batches: `batches[step]` for any step >= 0, a pure function of the seed and the step.

    Each micro-batch holds every attribute in proportion to its instances, and at least once; instances of which no
    aspect is known are drawn as those of one more attribute. Within an attribute the instances of an epoch are
    shuffled, then sorted by bucket, and micro-batch k takes the k-th slice of every attribute, so micro-batches hold
    instances that need the same bucket, short and long ones of it in equal parts, which makes their tokens about as
    many. The bucket of a step is the largest that one of its rows needs. Then the steps are shuffled. An attribute with
    fewer instances than places repeats some.

    Packed, a share of a micro-batch has room for the tokens of the fullest one of its bucket in many epochs; a step
    that needs more is left unpacked, so a bucket has one shape and hardly ever two. In a micro-batch a long text
    follows a short one, for the sake of devices that share it.
    """

    def __init__(
        self,
        examples: Examples,
        buckets: Sequence[Limits],
        batch_size: int,
        accumulate: int,
        seed: int,
        own: np.ndarray | None = None,
        shares: int = 0,
    ):
        """batch_size: instances of a step, all micro-batches and processes together. own: the numbers of the rows of a
        micro-batch that this process reads (`mesh.own_rows`); None: all. shares: into how many parts devices split the
        rows of a micro-batch, whose tokens are packed for each; 0: nothing is packed.

        Raises UserError when a micro-batch has no place for every attribute.
        """
        rows = batch_size // accumulate
        self.examples, self.buckets = examples, [tuple(bucket) for bucket in buckets]
        # Fewer instances than a batch holds make one step an epoch, in which they repeat.
        self.steps_per_epoch = max(len(examples) // batch_size, 1)
        self._accumulate, self._seed = accumulate, seed
        self.columns = None  # as in `collate`; to be set before the first batch is taken
        self._own, self._shares = slice(None) if own is None else own, shares
        self.bucket_of = assign_buckets(examples.lengths, self.buckets)
        self._widths = widths_of(examples, self.bucket_of, self.buckets)
        # An instance with several labels is drawn as one of its rarest attribute, so that this one is in every batch;
        # in the losses it counts for all of them.
        known = examples.labels != UNKNOWN
        rarest = np.where(known, known.sum(axis=0), len(examples) + 1).argmin(axis=1)
        rarest[~known.any(axis=1)] = known.shape[1]
        for attribute in np.setdiff1d(np.flatnonzero(known.any(axis=0)), rarest):
            # It occurs only beside rarer ones; every second of its instances is drawn for its sake.
            rarest[np.flatnonzero(known[:, attribute])[1::2]] = attribute
        self._strata = [np.flatnonzero(rarest == attribute) for attribute in np.unique(rarest)]
        if len(self._strata) > rows:
            attributes = int(known.any(axis=0).sum())
            others = " and instances without one" if len(self._strata) > attributes else ""
            raise UserError(
                f"the data has {attributes} attributes{others}, but a micro-batch (train.batch_size / "
                f"train.accumulate) only {rows} instances; each attribute needs one"
            )
        self._quotas = _quotas([len(s) for s in self._strata], rows, self.steps_per_epoch * accumulate)
        # Two, because prefetching threads work on the end of an epoch and the start of the next.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)
        self._room = self._rooms() if shares else None

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        indices, bucket = self._place(step)
        batch = collate(self.examples, indices[:, self._own], self._widths[bucket], self.columns)
        return batch | self._tokens(indices, bucket) if self._shares else batch

    def bucket(self, step: int) -> Limits:
        """The shape of a step."""
        return self.buckets[self._place(step)[1]]

    def stream(self, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches from step `start` on, without end, prepared ahead in threads by Grain."""
        if isinstance(self.examples, TokenArrays):  # nothing to prepare, and Grain may not be installed
            yield from map(self.__getitem__, itertools.count(start))
        import grain  # slow to import

        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(self.__getitem__)
        yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))

    @property
    def padding_fraction(self) -> float:
        """The share of the first epoch's token places, encoders' and decoder's, that is padding; packed, of those that
        all but attention computes on."""
        indices, buckets = self._epoch(0)
        places = np.array(self._widths) * indices[0].size
        if self._shares:
            places[:, : len(FIELDS)] = self._room * self._accumulate * self._shares
        return 1.0 - float(self.examples.lengths[indices].sum() / places[buckets].sum())

    def _filled(self, indices: np.ndarray) -> np.ndarray:
        """(..., W, len(FIELDS)) tokens of each share of micro-batches (..., B)."""
        lengths = self.examples.lengths[indices][..., : len(FIELDS)]
        return lengths.reshape(*indices.shape[:-1], self._shares, -1, len(FIELDS)).sum(axis=-2)

    def _rooms(self) -> np.ndarray:
        """(buckets, len(FIELDS)): for how many tokens a share has room. For all its places where that saves little, and
        where a prompt stands before the reply."""
        plans = [self._plan(epoch) for epoch in range(min(-(-LOOKED_AT // self.steps_per_epoch), EPOCHS))]
        filled = np.concatenate([self._filled(indices).max(axis=(1, 2)) for indices, _ in plans])
        buckets = np.concatenate([buckets for _, buckets in plans])
        rooms = np.array(self.buckets) * (plans[0][0].shape[-1] // self._shares)
        for bucket in np.unique(buckets):
            fullest = filled[buckets == bucket].max(axis=0) + rooms[bucket] // SPARE
            fullest = -(-fullest // ROUND) * ROUND
            saves = fullest <= WORTH * rooms[bucket]
            saves[-1] &= self.examples.lengths.shape[1] == len(FIELDS)
            rooms[bucket] = np.where(saves, fullest, rooms[bucket])
        return rooms

    def _tokens(self, indices: np.ndarray, bucket: int) -> dict[str, np.ndarray]:
        """Where the tokens of this process' rows of a step are, (G, W, U) for each field that is packed."""
        own, rows = indices[:, self._own], indices.shape[1] // self._shares
        widths, room, read = np.array(self.buckets[bucket]), self._room[bucket], self.columns or {}
        packed = (room < rows * widths) & [f"{name}_mean" not in read for name in FIELDS]
        if (self._filled(indices) > room)[..., packed].any():
            return {}
        found = {}
        for field in np.flatnonzero(packed):
            length = self.examples.lengths[own, field].reshape(len(own), -1, rows, 1)
            inside = (np.arange(widths[field]) < length).reshape(*length.shape[:2], -1)
            places = np.full((*length.shape[:2], room[field]), -1, np.int32)
            places[np.arange(room[field]) < inside.sum(axis=-1, keepdims=True)] = np.nonzero(inside)[-1]
            found[f"{FIELDS[field]}_tokens"] = places
        return found

    def _place(self, step: int) -> tuple[np.ndarray, int]:
        """The instances (G, B) of a step, all processes', and the index of its bucket."""
        epoch, position = divmod(int(step), self.steps_per_epoch)
        indices, buckets = self._epoch(epoch)
        return indices[position], int(buckets[position])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The instances (steps, G, B) and the bucket indices (steps,) of an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        parts = []
        for members, quota in zip(self._strata, self._quotas.T, strict=True):
            places = quota.sum()
            order = np.concatenate([rng.permutation(members) for _ in range(-(-places // len(members)))])[:places]
            order = np.concatenate([
                self._spread(order[self.bucket_of[order] == bucket], max(round(quota.mean()), 1), rng)
                for bucket in range(len(self.buckets))
            ])  # fmt: skip
            parts.append(np.split(order, np.cumsum(quota)[:-1]))
        micro_batches = np.stack([np.concatenate(slices) for slices in zip(*parts, strict=True)])
        micro_batches = self._paired(micro_batches, rng)
        steps = micro_batches.reshape(self.steps_per_epoch, self._accumulate, -1)
        steps = rng.permutation(steps)
        return steps, self.bucket_of[steps].max(axis=(1, 2))

    def _paired(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Micro-batches (M, B) in a random order in which a long text follows a short one, so that shares of their rows
        have about as many tokens each."""
        number, B = rows.shape
        order = np.argsort(self.examples.lengths[rows, 1], axis=1, kind="stable")
        pairs = rng.permuted(np.tile(np.arange(B // 2), (number, 1)), axis=1)
        places = np.full((number, B), B // 2)
        places[:, : B - B % 2] = np.stack([pairs, B - 1 - pairs], axis=-1).reshape(number, -1)
        return np.take_along_axis(rows, np.take_along_axis(order, places, axis=1), axis=1)

    def _spread(self, rows: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """Rows in a random order in which any `number` in a row are short and long ones in equal parts."""
        ranked = rows[np.argsort(self.examples.lengths[rows, 1], kind="stable")]
        bands = [rng.permutation(band) for band in np.array_split(ranked, number)]
        return np.concatenate(bands)[np.argsort(np.concatenate([np.arange(len(b)) for b in bands]), kind="stable")]


def _quotas(sizes: Sequence[int], rows: int, micro_batches: int) -> np.ndarray:
    """(micro_batches, attributes) places in each micro-batch: at least 1 each, the rest in proportion to the sizes.

    By largest remainder of what is due to each attribute so far, so that rounding evens out over an epoch.
    """
    share = np.array(sizes) / sum(sizes) * rows
    share = np.maximum(share, 1.0)
    spare = share - 1.0
    share -= spare * (share.sum() - rows) / max(spare.sum(), 1e-9)  # what the small ones got beyond their share
    quotas = np.ones((micro_batches, len(sizes)), int)
    given = np.zeros(len(sizes))
    for k in range(micro_batches):
        due = share * (k + 1) - given
        quotas[k] = np.maximum(np.floor(due + 1e-6), 1)
        while (left := rows - quotas[k].sum()) != 0:
            remainder = due - quotas[k]
            if left > 0:
                quotas[k][np.argmax(remainder)] += 1
            else:
                quotas[k][np.argmin(np.where(quotas[k] > 1, remainder, np.inf))] -= 1
        given += quotas[k]
    return quotas


def by_length(
    compute: Callable, lengths: np.ndarray, tokens_of: Callable[[list[int]], Sequence[Sequence[int]]], padding: int
) -> np.ndarray:
    """What a model makes of every text, (N, ...) float32: texts of similar length together, so that little is padding
    and few shapes compile.

    compute: tokens (B, S), length (B,) -> (B, ...). lengths: (N,), each at least 1. tokens_of: of some texts.
    """
    found = None
    for width in range(16, lengths.max() + 16, 16):
        rows = np.flatnonzero((lengths > width - 16) & (lengths <= width))
        for start in range(0, len(rows), READ_TOGETHER):
            some = rows[start : start + READ_TOGETHER]
            tokens = np.full((READ_TOGETHER, width), padding, np.int32)
            for i, row in enumerate(tokens_of(some.tolist())):
                tokens[i, : len(row)] = row
            values = np.asarray(compute(tokens, np.resize(lengths[some], READ_TOGETHER)), np.float32)[: len(some)]
            found = np.empty((len(lengths), *values.shape[1:]), np.float32) if found is None else found
            found[some] = values
    return found


def evaluation_batches(
    examples: Examples,
    buckets: Sequence[Limits],
    batch_size: int,
    own: np.ndarray | None = None,
    columns: dict[str, np.ndarray] | None = None,
    among: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches (B, ...) that hold every instance once, in the order of their buckets.

    Beside a training batch's arrays they have `turn` (B,), the number of questions in the context, and `weight` (B,)
    float32: 1, or 0 for the rows that fill up the last batch, which have no labels and no reply either.

    own: as of `Batches`. among: (N,) bool, the instances that count; None: all.
    """
    own = slice(None) if own is None else own
    bucket_of = assign_buckets(examples.lengths, buckets)
    widths = widths_of(examples, bucket_of, buckets)
    order = np.argsort(bucket_of, kind="stable")
    order = order if among is None else order[among[order]]
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        bucket = widths[bucket_of[indices].max()]
        weight = (np.arange(batch_size) < len(indices))[own]
        indices = np.resize(indices, batch_size)[own]
        batch = collate(examples, indices, bucket, columns)
        batch["labels"] = np.where(weight[:, None], batch["labels"], UNKNOWN)
        batch["reply_length"] = np.where(weight, batch["reply_length"], 1)
        yield batch | {"turn": examples.turns[indices], "weight": weight.astype(np.float32)}
