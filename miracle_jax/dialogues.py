"""Instances as a TFDS dataset in ArrayRecord files, built once per content. TensorFlow is not needed."""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miracle_jax import storage
from miracle_jax.attributes import Schema
from miracle_jax.dataset import Instance, Source, read_bytes, read_files
from miracle_jax.errors import UserError

VERSION = "1.0.0"
"""Of the built datasets' form; a change of it rebuilds them all."""
SPLIT = "instances"


class Dialogues:
    """A built dataset: instances that are read from ArrayRecord files when they are asked for."""

    def __init__(self, folder: Path):
        import tensorflow_datasets as tfds  # slow to import

        self.folder = folder
        builder = tfds.builder_from_directory(folder / "miracle_dialogues" / VERSION)
        self._source = builder.as_data_source(split=SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Instance:
        return self.read([i])[0]

    def read(self, indices: Sequence[int]) -> list[Instance]:
        """The instances of these numbers."""
        return [
            Instance(
                questions=tuple(turn.decode() for turn in record["questions"]),
                replies=tuple(turn.decode() for turn in record["replies"]),
                topic=record["topic"].decode(),
                labels=tuple(record["labels"].tolist()),
                id=record["id"].decode(),
            )
            for record in self._source.__getitems__([int(i) for i in indices])
        ]


def build(files: Sequence[Source], schema: Schema, cache: str, on_error: str = "stop") -> Dialogues:
    """The instances of `files` as a TFDS dataset under `cache`, built unless it is there already.

    Its folder is named by the content: files, their attributes and the schema. cache: a local folder or a gs:// path,
    from which a local copy is made.
    Raises UserError as `read_files` does.
    """
    contents = [(attribute, path, storage.read(path)) for attribute, path in files]
    key = hashlib.sha256(f"{VERSION}\n{schema.to_toml()}".encode())
    for attribute, _, content in contents:
        key.update(f"\n{attribute} {hashlib.sha256(content).hexdigest()}".encode())
    reported = False

    def write(folder: Path) -> None:
        nonlocal reported
        instances, dropped = read_bytes(contents, schema, on_error)
        reported = True
        _write_tfds(folder, instances, len(schema.names))
        (folder / "dropped.json").write_text(json.dumps(dropped))

    folder = storage.build_once(cache, f"dialogues-{key.hexdigest()[:20]}", write)
    if not reported and (folder / "dropped.json").read_text() != "0":
        read_bytes(contents, schema, on_error)  # built without its malformed lines: complain, or count them, again
    return Dialogues(folder)


def build_all(
    splits: Sequence[Sequence[Source]], schema: Schema, cache: str, on_error: str = "stop"
) -> list[Dialogues]:
    """`build` for several lists of files; when they have problems, one error tells those of all of them."""
    try:
        return [build(files, schema, cache, on_error) for files in splits]
    except UserError:
        read_files([source for files in splits for source in files], schema, on_error)
        raise


def _write_tfds(folder: Path, instances: Sequence[Instance], attributes: int) -> None:
    """Writes a TFDS dataset to folder/miracle_dialogues/VERSION."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class MiracleDialogues(tfds.core.GeneratorBasedBuilder):
            """Instances in the form of the paper's data."""

            VERSION = tfds.core.Version(VERSION)

            def _info(self):
                texts = tfds.features.Sequence(tfds.features.Text())
                features = {
                    "questions": texts,
                    "replies": texts,
                    "topic": tfds.features.Text(),
                    "labels": tfds.features.Tensor(shape=(attributes,), dtype=np.int32),
                    "id": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, _):
                return {SPLIT: self._generate_examples()}

            def _generate_examples(self):
                for i, instance in enumerate(instances):
                    yield i, dataclasses.asdict(instance) | {"labels": np.array(instance.labels, np.int32)}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes, which is a temporary folder
        builder = MiracleDialogues(data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
