"""Encoder and decoder tokenizers, and the one place where a conversation becomes token ids.

A context is `User:{q}\n\nAssistant:{r}\n\n ... User:{qM}\n\nAssistant:`. It is put together from the token lists of its
turns and cut turn by turn, never by searching text, so whatever a user writes stays text: neither turn markers nor the
names of special tokens have a meaning in it.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from miracle_jax import gguf_file, hub, reading, storage
from miracle_jax.config import WIDEST, Config, Decoder
from miracle_jax.errors import UserError, first_line

LONGEST_TURN = 2**16
"""Characters of a turn that are read, from its end: many times what a model has room for. Tokenising takes some 200
bytes a character."""

Ids = list[int]


def _check_ids(content: bytes, name: str) -> None:
    """Raises UserError for a tokenizer.json or vocab.json with ids that no model has: they would take memory."""
    value = reading.parse_object(content, f"{name} is not valid JSON")
    model, added = value.get("model"), value.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else value
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if strange := [i for i in ids if type(i) in (int, float) and not 0 <= i < WIDEST]:
        raise UserError(f"{name} has a token of the id {strange[0]}; a vocabulary has at most {WIDEST:,} tokens")


class _Tokenizer:
    """A `tokenizers.Tokenizer` that adds nothing to a text, cuts nothing and reads no special tokens out of it.

    special: name in transformers' tokenizer_config.json -> the special token, such as {"cls_token": "[CLS]"}.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.special = backend, special
        # Ids may have gaps, so the number of entries is not the number of rows that a model needs.
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._user, self._assistant, self._between = self.encode_batch(["User:", "Assistant:", "\n\n"])

    def _ids(self) -> Ids:
        """Of the special tokens in ROLES. Raises UserError for one that is not in the vocabulary."""
        tokens = [self.special.get(role) for role in self.ROLES]
        ids = [self.backend.token_to_id(token) if isinstance(token, str) else None for token in tokens]
        if None in ids:
            role = self.ROLES[ids.index(None)]
            raise UserError(f"a tokenizer has no {role}, or not in its vocabulary: {self.special.get(role)!r}")
        return ids

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _turns(self, questions: Sequence[str], replies: Sequence[str]) -> tuple[list[Ids], list[Ids]]:
        ids = self.encode_batch([turn.strip()[-LONGEST_TURN:] for turn in (*questions, *replies)])
        return ids[: len(questions)], ids[len(questions) :]

    def _cut(self, questions: Sequence[Ids], replies: Sequence[Ids], room: int) -> Ids:
        """The rendered context in at most `room` tokens, without special tokens."""
        if len(replies) != len(questions) - 1:
            raise ValueError(f"a context has one reply fewer than questions, not {len(questions)} and {len(replies)}")
        turns = []  # (marker, text), oldest first
        for i, question in enumerate(questions):
            turns.append((self._user, question))
            turns.append((self._assistant, replies[i] if i < len(replies) else []))
        separators = len(self._between) * (len(turns) - 1)
        excess = sum(len(marker) + len(text) for marker, text in turns) + separators - room
        ids = []
        for i, (marker, text) in enumerate(turns):
            last = i >= len(turns) - 2  # the last question and the marker of the reply to come
            if excess > 0 and not last and excess >= len(text):
                excess -= len(marker) + len(text) + len(self._between)
                continue
            if excess > 0 and text:
                if last:
                    warnings.warn(f"a question is longer than {self.LIMIT}; only its end is read", stacklevel=1)
                cut = min(excess, len(text))
                text, excess = text[cut:], excess - cut
            ids += marker + text
            if i < len(turns) - 1:
                ids += self._between
        return ids[max(excess, 0) :]

    def files(self) -> dict[str, bytes]:
        """File name -> content, in the layout of transformers."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.special}
        return {
            "tokenizer.json": self.backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        }

    @classmethod
    def from_files(cls, files: dict[str, bytes]):
        """Reads what `files` gives. Raises UserError where they are missing or damaged."""
        config = reading.parse_object(files.get("tokenizer_config.json", b""), "tokenizer_config.json is invalid JSON")
        special = {name: token for name, token in config.items() if name.endswith("_token")}
        _check_ids(files.get("tokenizer.json", b""), "tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_str(files.get("tokenizer.json", b"").decode()), special)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"the tokenizers are damaged ({first_line(error)}); restore them from a copy") from None


class EncoderTokenizer(_Tokenizer):
    """BERT's side: contexts, and contexts followed by a reply."""

    ROLES = ("cls_token", "sep_token", "pad_token")
    LIMIT = "the encoder's limit"

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]):
        super().__init__(backend, special)
        self.cls_id, self.sep_id, self.pad_id = self._ids()

    def context(self, questions: Sequence[str], replies: Sequence[str], limit: int) -> Ids:
        """[CLS] context [SEP], at most `limit` tokens. questions: M; replies: the M - 1 before the last question.

        What does not fit is taken from the start of the oldest turn, then that turn is dropped, and so on. A last
        question that alone is too long keeps its end, with a warning.
        """
        return self.context_of(*self._turns(questions, replies), limit)

    def joint(self, questions: Sequence[str], replies: Sequence[str], reply: str, limit: int, reply_limit: int) -> Ids:
        """[CLS] context reply [SEP], at most `limit` tokens, of which the context gives way.

        reply_limit: as in `DecoderTokenizer.reply`: the reply itself keeps at most reply_limit - 2 tokens.
        """
        return self.joint_of(*self._turns(questions, replies), self.encode(reply.strip()), limit, reply_limit)

    def context_of(self, questions: Sequence[Ids], replies: Sequence[Ids], limit: int) -> Ids:
        """`context` of turns that are encoded already."""
        return [self.cls_id, *self._cut(questions, replies, limit - 2), self.sep_id]

    def joint_of(
        self, questions: Sequence[Ids], replies: Sequence[Ids], reply: Ids, limit: int, reply_limit: int
    ) -> Ids:
        """`joint` of turns that are encoded already."""
        reply = reply[: min(reply_limit, limit) - 2]
        return [self.cls_id, *self._cut(questions, replies, limit - 2 - len(reply)), *reply, self.sep_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


class DecoderTokenizer(_Tokenizer):
    """GPT-2's side: replies."""

    ROLES = ("bos_token", "eos_token")
    LIMIT = "decoder.context_tokens"

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, str]):
        super().__init__(backend, special)
        self.bos_id, self.eos_id = self._ids()

    def reply(self, text: str, limit: int) -> Ids:
        """<bos> text <eos>, the text cut on the right so that all of it is at most `limit` tokens."""
        return self.reply_of(self.encode(text.strip()), limit)

    def reply_of(self, ids: Ids, limit: int) -> Ids:
        """`reply` of a text that is encoded already."""
        return [self.bos_id, *ids[: limit - 2], self.eos_id]

    def prompt(self, questions: Sequence[str], replies: Sequence[str], shape: Decoder) -> Ids:
        """The context as a decoder of this shape reads it before a reply; nothing where it does not see it.

        questions, replies: as in `EncoderTokenizer.context`, and cut in the same way.
        """
        return self.prompt_of(*self._turns(questions, replies), shape)

    def prompt_of(self, questions: Sequence[Ids], replies: Sequence[Ids], shape: Decoder) -> Ids:
        """`prompt` of turns that are encoded already."""
        if not shape.sees_context:
            return []
        if not shape.context_tokens:
            questions, replies = questions[-1:], []
        return self._cut(questions, replies, shape.prompt_limit)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of `ids` up to <eos>; without special tokens unless `specials`."""
        ids = list(ids)
        end = ids.index(self.eos_id) + specials if self.eos_id in ids else len(ids)
        text = self.backend.decode(ids[:end], skip_special_tokens=not specials)
        return text if specials else text.strip()


class Tokenizers:
    """Both tokenizers of a model, kept with its checkpoints."""

    def __init__(self, encoder: EncoderTokenizer, decoder: DecoderTokenizer):
        self.encoder, self.decoder = encoder, decoder

    def files(self) -> dict[str, bytes]:
        """Relative path -> content."""
        return {
            f"{name}/{file}": content
            for name, tokenizer in (("encoder", self.encoder), ("decoder", self.decoder))
            for file, content in tokenizer.files().items()
        }

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> "Tokenizers":
        def part(name):
            return {path.removeprefix(name): content for path, content in files.items() if path.startswith(name)}

        return cls(EncoderTokenizer.from_files(part("encoder/")), DecoderTokenizer.from_files(part("decoder/")))

    def save(self, folder: str | Path) -> None:
        """Writes folder/encoder and folder/decoder, which transformers' AutoTokenizer loads as well."""
        for path, content in self.files().items():
            with storage.replacing(Path(folder) / path) as file:
                file.write(content)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizers":
        """Reads what `save` wrote."""
        names = ("tokenizer.json", "tokenizer_config.json")
        paths = [f"{part}/{name}" for part in ("encoder", "decoder") for name in names]
        if missing := [path for path in paths if not (Path(folder) / path).is_file()]:
            raise UserError(f"{folder}/{missing[0]} is missing; it belongs to the tokenizers that training keeps")
        files = {path: reading.content(Path(folder) / path) for path in paths}
        try:
            return cls.from_files(files)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None

    def check(self, config: Config) -> None:
        """Raises UserError when the model has fewer embedding rows than a tokenizer has tokens."""
        for name, tokenizer, rows in (
            ("encoder", self.encoder, config.encoder.vocab_size),
            ("decoder", self.decoder, config.decoder.vocab_size),
        ):
            if tokenizer.size > rows:
                raise UserError(
                    f"the {name} tokenizer has {tokenizer.size} tokens, but {name}.vocab_size is {rows}; "
                    f"set --{name}.vocab-size {tokenizer.size}"
                )


def load_or_train(config: Config, texts: Iterable[str]) -> Tokenizers:
    """The tokenizers that `config.data` names; where it names none, one trained on `texts` (questions and replies).

    Training is deterministic: the same set of texts gives the same tokenizer in every process.
    """
    data = config.data
    # A set, since training counts words: a turn that is repeated in the instances of its dialogue counts once.
    texts = sorted(set(texts)) if not (data.encoder_tokenizer and data.decoder_tokenizer) else []
    if data.encoder_tokenizer:
        encoder = load_tokenizer("encoder", data.encoder_tokenizer)
    else:
        encoder = train_wordpiece(texts, config.encoder.vocab_size)
    if data.decoder_tokenizer:
        decoder = load_tokenizer("decoder", data.decoder_tokenizer)
    else:
        decoder = train_bpe(texts, config.decoder.vocab_size)
    both = Tokenizers(encoder, decoder)
    both.check(config)
    return both


def train_wordpiece(texts: Sequence[str], size: int) -> EncoderTokenizer:
    """A lower-casing WordPiece tokenizer of at most `size` tokens, with BERT's text normalisation."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(char for text in texts for char in normalizer.normalize_str(text) if not char.isspace())
    # All of ASCII, since users write more than the corpus does. Of the rest the rare ones become [UNK] rather than take
    # up the vocabulary.
    ascii = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    others = sorted(counts.keys() - set(ascii), key=lambda c: (-counts[c], c))
    chars = sorted(ascii + others[: max(size // 4 - len(ascii), 0)])
    alphabet = [*chars, *("##" + c for c in chars)]
    _check_room("encoder", size, len(special + alphabet))

    def tokenizer(vocabulary):
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        backend.normalizer = normalizer
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        return backend

    # The trainer numbers the ## characters in the order of a randomly seeded hash map and breaks ties by number.
    # Named beforehand (as "special" tokens, the only way to name them) they have the same numbers every time.
    backend = tokenizer({"[UNK]": 0})
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=special + alphabet, limit_alphabet=len(chars), show_progress=False
    )
    markers = ["User:", "Assistant:"] * 100  # often enough to become single tokens
    backend.train_from_iterator([*texts, *markers], trainer)
    backend = tokenizer(backend.get_vocab())
    backend.add_special_tokens(special)
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    roles = dict(zip(EncoderTokenizer.ROLES, ("[CLS]", "[SEP]", "[PAD]"), strict=True))
    return EncoderTokenizer(backend, roles | {"unk_token": "[UNK]", "mask_token": "[MASK]"})


def train_bpe(texts: Sequence[str], size: int) -> DecoderTokenizer:
    """A byte-level BPE tokenizer of at most `size` tokens."""
    special, alphabet = ["<bos>", "<eos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_room("decoder", size, len(special + alphabet))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return DecoderTokenizer(backend, dict(zip(DecoderTokenizer.ROLES, special, strict=True)))


def _check_room(name: str, size: int, least: int) -> None:
    if size < least:
        raise UserError(
            f"{name}.vocab_size is {size}, but special tokens and single characters alone take {least}; "
            f"set at least --{name}.vocab-size {2 * least}"
        )


def load_tokenizer(part: str, name: str) -> EncoderTokenizer | DecoderTokenizer:
    """The tokenizer in a folder, a .gguf file or a hub repository. part: "encoder" or "decoder".

    GPT-2's has one token for both ends of a text; it is <eos> here and <bos> is added, as in the released code.
    """
    backend, special = _from_transformers(name, f"data.{part}_tokenizer")
    if part == "encoder":
        missing = [role for role in EncoderTokenizer.ROLES if role not in special]
        if missing:
            raise UserError(
                f"data.encoder_tokenizer {name} has no {', '.join(missing)}; a BERT tokenizer has all three"
            )
        return EncoderTokenizer(backend, {role: special[role] for role in EncoderTokenizer.ROLES})
    eos = special.get("eos_token", "<eos>")
    bos = special.get("bos_token", "<bos>")
    bos = "<bos>" if bos == eos else bos
    backend.add_special_tokens([bos, eos])
    return DecoderTokenizer(backend, {"bos_token": bos, "eos_token": eos})


def _from_transformers(name: str, field: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The fast tokenizer of a hub name, folder or .gguf file, and its special tokens by role."""
    path = hub.locate(name, field) if name.startswith("package:") else Path(name).expanduser()
    if path.suffix == ".gguf":
        return gguf_file.tokenizer_of(hub.locate(str(path), field))
    from transformers import AutoTokenizer  # slow to import

    for file in (path / "tokenizer.json", path / "vocab.json"):
        if file.is_file():
            _check_ids(reading.content(file, reading.LONGEST), str(file))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name, trust_remote_code=False)
        # A copy: what we change must not show in the caller's other uses of it.
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        if backend:
            backend.encode("a \N{SNOWMAN}")  # some lack what they need for unknown words, and say so only here
    except Exception as error:  # a damaged tokenizer.json raises nothing more special
        reason = first_line(error)
        raise UserError(
            f"{field} {name!r} is neither a folder with a tokenizer nor a hub name within reach: {reason}"
        ) from None
    if backend is None:
        raise UserError(f"{field} {name!r} has no fast tokenizer; name one that has a tokenizer.json")
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return backend, special
