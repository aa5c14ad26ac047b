"""Tokenised instances: read from a dataset when they are asked for, or all of them from a frozen file."""

import hashlib
import io
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from miracle_jax import reading, storage
from miracle_jax.attributes import Schema
from miracle_jax.config import Decoder
from miracle_jax.dataset import Instance
from miracle_jax.dialogues import Dialogues
from miracle_jax.errors import UserError, first_line
from miracle_jax.tokenizers import Tokenizers

FIELDS = ("context", "joint", "reply")
"""[CLS] context [SEP]; [CLS] context reply [SEP]; <bos> reply <eos>."""
PROMPT = "prompt"
"""The fourth field where the decoder sees the context: the context before the reply."""
FORMAT = 1
"""Of length indices and frozen files."""
UNPACKED = 2**33
"""Bytes that the arrays of a compressed .npz file may take, which can be a thousand times its size."""
KEPT = 2**18
"""Instances whose tokens stay in memory once they are read; about 1 kB each."""

Limits = tuple[int, int, int]
"""Most tokens of context, joint and reply."""
Row = tuple[np.ndarray, ...]
"""The token ids, int32, of each field."""


NOTHING_SEEN = Decoder()
"""A decoder that does not see the context."""


class Examples(Protocol):
    """Tokenised instances; N of them."""

    lengths: np.ndarray
    """(N, 3) or (N, 4) int32: tokens of each field."""
    labels: np.ndarray
    """(N, A) int32: aspect ids, -1 where unknown."""
    turns: np.ndarray
    """(N,) int32: number of questions in the context, 1 in a first turn."""
    padding: tuple[int, ...]
    """The id that fills up each field."""

    def __len__(self) -> int: ...

    def tokens(self, indices: Sequence[int]) -> list[Row]:
        """The fields of some instances."""
        ...


class TokenisedDialogues:
    """Examples that are read and tokenised when they are first asked for, so that a process reads only its own.

    Planning batches takes everybody's lengths: they are computed once and kept beside the dataset, under a name made
    from the tokenizers and the limits.
    """

    def __init__(self, instances: Dialogues, tokenizers: Tokenizers, limits: Limits, decoder: Decoder = NOTHING_SEEN):
        """decoder: the shape that tells what it sees of the context."""
        self._instances, self._tokenizers, self._limits, self._decoder = instances, tokenizers, limits, decoder
        self.padding = _padding(tokenizers)
        seen = (decoder.sees_context, decoder.prompt_limit, decoder.context_tokens)
        name = hashlib.sha256(f"{FORMAT} {tokenizers_key(tokenizers)} {limits} {seen}".encode()).hexdigest()[:20]
        path = instances.folder / f"lengths-{name}.npz"
        try:
            index = read_arrays(path)
            self.lengths, self.labels, self.turns = index["lengths"], index["labels"], index["turns"]
        except (UserError, KeyError):  # there is none yet, or none that is whole
            index = self._index()
            with storage.replacing(path) as file:
                np.savez(file, **index)
            self.lengths, self.labels, self.turns = index["lengths"], index["labels"], index["turns"]
        self._kept: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._instances)

    def tokens(self, indices: Sequence[int]) -> list[Row]:
        new = list({i: None for i in indices if i not in self._kept})
        rows = dict(zip(new, self._tokenise(self._instances.read(new)), strict=True)) if new else {}
        if len(self._kept) < KEPT:
            self._kept.update(rows)
        return [rows[i] if i in rows else self._kept[i] for i in indices]

    def _tokenise(self, instances: Sequence[Instance]) -> list[Row]:
        encoder, decoder = self._tokenizers.encoder, self._tokenizers.decoder
        context_limit, joint_limit, reply_limit = self._limits
        # The instances of a dialogue repeat its turns, so each text is encoded once.
        turns = list({turn.strip() for i in instances for turn in (*i.questions, *i.replies)})
        targets = list({i.replies[-1].strip() for i in instances})
        turn_ids = dict(zip(turns, encoder.encode_batch(turns), strict=True))
        target_ids = dict(zip(targets, decoder.encode_batch(targets), strict=True))
        sees = self._decoder.sees_context
        seen_ids = dict(zip(turns, decoder.encode_batch(turns), strict=True)) if sees else {}
        rows = []
        for instance in instances:
            questions = [turn_ids[turn.strip()] for turn in instance.questions]
            *replies, reply = (turn_ids[turn.strip()] for turn in instance.replies)
            row = (
                encoder.context_of(questions, replies, context_limit),
                encoder.joint_of(questions, replies, reply, joint_limit, reply_limit),
                decoder.reply_of(target_ids[instance.replies[-1].strip()], reply_limit),
            )
            if sees:
                seen = (
                    [seen_ids[turn.strip()] for turn in side] for side in (instance.questions, instance.replies[:-1])
                )
                row += (decoder.prompt_of(*seen, self._decoder),)
            rows.append(tuple(np.array(ids, np.int32) for ids in row))
        return rows

    def _index(self) -> dict[str, np.ndarray]:
        lengths, labels, turns = [], [], []
        for start in range(0, len(self), 4096):
            instances = self._instances.read(range(start, min(start + 4096, len(self))))
            lengths += [[len(ids) for ids in row] for row in self._tokenise(instances)]
            labels += [instance.labels for instance in instances]
            turns += [len(instance.questions) for instance in instances]
        return {
            "lengths": np.array(lengths, np.int32),
            "labels": np.array(labels, np.int32),
            "turns": np.array(turns, np.int32),
        }


class TokenArrays:
    """Examples in memory, as a frozen file holds them."""

    def __init__(self, arrays: dict[str, np.ndarray], padding: tuple[int, ...]):
        """arrays: `lengths`, `labels`, `turns`, and for each of FIELDS the tokens of all instances in one row."""
        self.lengths, self.labels, self.turns = arrays["lengths"], arrays["labels"], arrays["turns"]
        self.padding = padding
        fields = (*FIELDS, PROMPT)[: self.lengths.shape[1]]
        self._rows = [np.split(arrays[f], np.cumsum(self.lengths[:-1, i])) for i, f in enumerate(fields)]

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, indices: Sequence[int]) -> list[Row]:
        return [tuple(rows[i] for rows in self._rows) for i in indices]


@dataclass(frozen=True)
class Corpus:
    """Everything that training learns from."""

    schema: Schema
    tokenizers: Tokenizers
    train: Examples
    validation: Examples
    key: str
    """Changes with the data, the schema and the tokenizers."""


def tokenizers_key(tokenizers: Tokenizers) -> str:
    """A name made from the tokenizers' content."""
    content = hashlib.sha256()
    for path, file in sorted(tokenizers.files().items()):
        content.update(f"{path} {len(file)}\n".encode() + file)
    return content.hexdigest()[:20]


def save_frozen(path: str | Path, corpus: Corpus) -> None:
    """Writes a corpus as token arrays in one .npz file, which appears whole or not at all."""
    arrays = {"format": np.array(FORMAT), "key": np.array(corpus.key), "schema.toml": _bytes(corpus.schema.to_toml())}
    for name, content in corpus.tokenizers.files().items():
        arrays[f"tokenizers/{name}"] = _bytes(content)
    for split in ("train", "validation"):
        examples = getattr(corpus, split)
        rows = examples.tokens(range(len(examples)))
        for field, name in enumerate((*FIELDS, PROMPT)[: examples.lengths.shape[1]]):
            arrays[f"{split}/{name}"] = np.concatenate([row[field] for row in rows])
        for name in ("lengths", "labels", "turns"):
            arrays[f"{split}/{name}"] = getattr(examples, name)
    with storage.replacing(path) as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, local or remote. Nothing is unpickled. Raises UserError for anything else."""
    file = io.BytesIO(storage.read(path)) if storage.is_remote(path) else reading.regular(path)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        size, packed = (sum(getattr(m, name) for m in members) for name in ("file_size", "compress_size"))
        if size > max(UNPACKED, packed):
            raise UserError(f"{path} unpacks to {size / 2**30:,.0f} GiB; at most {UNPACKED / 2**30:,.0f} are read")
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (
        ValueError, LookupError, EOFError, TypeError, OSError, SyntaxError, ArithmeticError, MemoryError,
        NotImplementedError, RuntimeError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
        lzma.LZMAError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is not a whole file of arrays ({first_line(error)}); write it again") from None
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray) or not array.itemsize]:
        raise UserError(f"{path} is not a whole file of arrays ({strange[0]!r} is none); write it again")
    return arrays


def load_frozen(path: str | Path) -> Corpus:
    """Reads what `save_frozen` wrote."""
    arrays = read_arrays(path)
    try:
        if arrays["format"] != FORMAT:
            raise UserError(f"{path} has frozen format {arrays['format']}, this is version {FORMAT}; freeze it again")
        schema = Schema.from_toml(arrays["schema.toml"].tobytes().decode(), str(path))
        tokenizers = Tokenizers.from_files({
            name.removeprefix("tokenizers/"): array.tobytes()
            for name, array in arrays.items() if name.startswith("tokenizers/")
        })  # fmt: skip
        padding = _padding(tokenizers)
        train, validation = (TokenArrays(_split(arrays, f"{name}/", schema, tokenizers), padding)
                             for name in ("train", "validation"))  # fmt: skip
        return Corpus(schema, tokenizers, train, validation, str(arrays["key"]))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a whole file of `python -m miracle_jax.dataset freeze` ({first_line(error)}); write it "
            "again"
        ) from None


def _split(arrays: dict[str, np.ndarray], prefix: str, schema: Schema, tokenizers: Tokenizers) -> dict[str, np.ndarray]:
    """The arrays of TokenArrays. Raises ValueError unless they are what `save_frozen` writes."""
    split = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if not all(array.dtype == np.int32 for array in split.values()):
        raise ValueError(f"{prefix} has numbers of another kind than int32")
    lengths, labels, turns = split["lengths"], split["labels"], split["turns"]
    if lengths.ndim != 2 or lengths.shape[1] not in (len(FIELDS), len(FIELDS) + 1) or not len(lengths):
        raise ValueError(f"{prefix}lengths has the shape {lengths.shape}")
    if labels.shape != (len(lengths), len(schema.names)) or turns.shape != (len(lengths),):
        raise ValueError(f"{prefix} has {len(lengths)} lengths, labels {labels.shape} and turns {turns.shape}")
    if (labels < -1).any() or (labels >= schema.sizes).any() or (lengths < 1)[:, : len(FIELDS)].any():
        raise ValueError(f"{prefix} has labels or lengths that cannot be")
    sizes = (tokenizers.encoder.size,) * 2 + (tokenizers.decoder.size,) * 2
    for field, (name, size) in enumerate(zip((*FIELDS, PROMPT)[: lengths.shape[1]], sizes, strict=False)):
        tokens = split[name]
        if tokens.shape != (lengths[:, field].sum(dtype=np.int64),) or (lengths[:, field] < 0).any():
            raise ValueError(f"{prefix}{name} has {tokens.size} tokens, which is not the sum of their lengths")
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= size:
            raise ValueError(f"{prefix}{name} has tokens that its tokenizer has not")
    return split


def _padding(tokenizers: Tokenizers) -> tuple[int, ...]:
    encoder, decoder = tokenizers.encoder.pad_id, tokenizers.decoder.eos_id
    return (encoder, encoder, decoder, decoder)


def _bytes(content: str | bytes) -> np.ndarray:
    return np.frombuffer(content.encode() if isinstance(content, str) else content, np.uint8)
