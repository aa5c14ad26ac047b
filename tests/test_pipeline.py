"""Batches: a pure function of (seed, step), stratified, bucketed, the same for any number of processes."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from miracle_jax import config, dataset, dialogues, examples, pipeline
from miracle_jax.attributes import Schema
from miracle_jax.errors import UserError
from miracle_jax.examples import FIELDS, TokenArrays, TokenisedDialogues
from miracle_jax.pipeline import Batches, evaluation_batches

BUCKETS = ((40, 60, 20), (60, 90, 20), (90, 120, 30))


def made_up(sizes, seed=0, lengths=None, labels=None) -> TokenArrays:
    """Examples of random lengths, sizes[a] of them labelled for attribute a; their first token is their number."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    if labels is None:
        labels = np.full((n, len(sizes)), -1, np.int32)
        labels[np.arange(n), np.repeat(np.arange(len(sizes)), sizes)] = rng.integers(0, 2, n)
    if lengths is None:
        context = rng.integers(5, 91, n)
        reply = rng.integers(4, 31, n)
        lengths = np.stack([context, context + reply, reply], axis=1)
    lengths = np.asarray(lengths, np.int32)
    arrays = {"lengths": lengths, "labels": np.asarray(labels, np.int32), "turns": rng.integers(1, 5, n)}
    for i, name in enumerate(FIELDS):
        numbers = np.repeat(np.arange(n), lengths[:, i])
        arrays[name] = numbers.astype(np.int32)
    return TokenArrays(arrays, padding=(-1, -1, -2))


def same(a: dict, b: dict) -> bool:
    equal = (np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    return a.keys() == b.keys() and all(equal)


def joined(parts: list[dict], axis: int) -> dict:
    return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> config.Config:
    """A config with 96 instances of the bundled corpus, 32 an attribute."""
    folder = tmp_path_factory.mktemp("data")
    named = []
    for name, path in dataset.bundled("train"):
        with open(path, "rb") as file:
            (folder / f"{name}.jsonl").write_bytes(b"".join(itertools.islice(file, 32)))
        named.append(f"{name}={folder / name}.jsonl")
    return config.Config(
        data=config.Data(
            train=tuple(named), validation=tuple(named[:2]), cache=str(folder / "cache"),
            buckets=((80, 128, 40), (128, 176, 64), (160, 224, 64)),
        ),
        encoder=config.Bert(vocab_size=1000), decoder=config.Gpt2(vocab_size=1000),
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(run) -> examples.Corpus:
    return pipeline.prepare(run)


# ------------------------------------------------------------------------------------------------ contents


def test_a_batch_holds_what_the_tokenizers_make_of_its_instances(run, corpus):
    built = dialogues.build(dataset.sources(run.data)[0], corpus.schema, run.data.cache)
    batches = Batches(corpus.train, run.data.buckets, 12, 2, seed=3)
    encoder, decoder = corpus.tokenizers.encoder, corpus.tokenizers.decoder
    for step in range(3):
        batch, bucket = batches[step], batches.bucket(step)
        assert {name: array.shape[2:] for name, array in batch.items()} == {
            "context": bucket[:1], "context_length": (), "joint": bucket[1:2], "joint_length": (),
            "reply": bucket[2:], "reply_length": (), "labels": (3,),
        }  # fmt: skip
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        indices, _ = batches._place(step)
        assert indices.shape == (2, 6)
        for place, i in np.ndenumerate(indices):
            instance = built[i]
            q, r = instance.questions, instance.replies
            expected = (
                encoder.context(q, r[:-1], 160), encoder.joint(q, r[:-1], r[-1], 224, 64), decoder.reply(r[-1], 64)
            )  # fmt: skip
            paddings = (encoder.pad_id, encoder.pad_id, decoder.eos_id)
            for name, ids, padding in zip(FIELDS, expected, paddings, strict=True):
                assert batch[f"{name}_length"][place] == len(ids)
                assert batch[name][place].tolist() == ids + [padding] * (batch[name].shape[-1] - len(ids))
            assert tuple(batch["labels"][place]) == instance.labels


def test_long_dialogues_are_cut_to_the_last_bucket(run, corpus):
    built = dialogues.build(dataset.sources(run.data)[0], corpus.schema, run.data.cache)
    short = TokenisedDialogues(built, corpus.tokenizers, (30, 50, 16))
    assert short.lengths.max(axis=0).tolist() == [30, 50, 16]
    batch = Batches(short, ((30, 50, 16),), 96, 1, seed=0)[0]
    rows = batch["reply"].reshape(-1, 16)[np.arange(96), batch["reply_length"].ravel() - 1]
    assert set(rows) == {corpus.tokenizers.decoder.eos_id}  # a reply that is cut still ends


# ------------------------------------------------------------------------------------------------ purity


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_is_a_pure_function_of_seed_and_step(accumulate):
    data = made_up([70, 50, 40])
    arguments = (data, BUCKETS, 12, accumulate)
    batches = Batches(*arguments, seed=1)
    steps = [40, 3, 0, 17, 3, 26]  # of several epochs of 13 steps, in any order
    first = {step: batches[step] for step in steps}
    again = Batches(*arguments, seed=1)
    assert all(same(again[step], first[step]) for step in sorted(steps))
    assert not same(batches[0], batches[13]) and not same(batches[0], Batches(*arguments, seed=2)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one_and_read_only_their_own(processes):
    whole = Batches(made_up([70, 50, 40]), BUCKETS, 24, 2, seed=1)
    read = []

    class Watched(TokenArrays):
        def tokens(self, indices):
            read.append(len(indices))
            return super().tokens(indices)

    parts = []
    for p in range(processes):
        data = made_up([70, 50, 40])
        data.__class__ = Watched
        parts.append(Batches(data, BUCKETS, 24, 2, 1, np.arange(12).reshape(processes, -1)[p]))
    for step in (0, 5, 6, 20):
        assert same(joined([part[step] for part in parts], axis=1), whole[step])
        assert len({part.bucket(step) for part in parts}) == 1
    assert set(read) == {24 // processes}


def test_resuming_a_stream_anywhere_gives_the_batches_by_step(corpus, run):
    batches = Batches(corpus.train, run.data.buckets, 12, 1, seed=0)
    assert batches.steps_per_epoch == 8
    for start in (0, 5, 11):
        stream = batches.stream(start)
        for step in range(start, start + 12):
            assert same(next(stream), batches[step]), (start, step)
    frozen = Batches(made_up([9, 9]), BUCKETS, 4, 1, seed=0)
    assert same(next(frozen.stream(7)), frozen[7])


# ------------------------------------------------------------------------------------------------ strata


def numbers(batch) -> np.ndarray:
    """The numbers (G, B) of `made_up` examples in a batch."""
    return batch["context"][..., 0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("sizes", [(40, 40, 40), (100, 19, 1), (7, 60), (30, 1, 1, 1)])
def test_every_micro_batch_holds_every_attribute_in_proportion(sizes, accumulate):
    data = made_up(sizes)
    batches = Batches(data, BUCKETS, 24, accumulate, seed=0)
    counts = np.array([
        (micro["labels"] >= 0).sum(axis=0)
        for step in range(batches.steps_per_epoch * 2)
        for micro in [{name: array[g] for name, array in batches[step].items()} for g in range(accumulate)]
    ])  # fmt: skip
    assert counts.min() >= 1 and set(counts.sum(axis=1)) == {24 // accumulate}
    share = np.array(sizes) / sum(sizes) * 24 / accumulate
    large = share >= 1.5
    small = (~large).sum() - share[~large].sum()  # places that the small attributes get beyond their share
    assert np.all(np.abs(counts[:, large].mean(axis=0) - share[large]) <= max(small, 0) + 0.5)
    assert np.all(np.abs(counts - counts.mean(axis=0)) < 1.01)


def test_a_rare_bucket_that_lacks_an_attribute_merges_upward():
    lengths = [[5, 10, 4]] * 30 + [[90, 120, 30]] * 3 + [[5, 10, 4]] * 27  # only attribute 0 has long ones
    batches = Batches(made_up([33, 27], lengths=lengths), BUCKETS, 12, 1, seed=0)
    taken = [batches.bucket(step) for step in range(batches.steps_per_epoch)]
    assert taken.count(BUCKETS[2]) == 1 and taken.count(BUCKETS[0]) == 4
    for step in range(5):
        assert np.all((batches[step]["labels"][0] >= 0).any(axis=0))


def test_an_epoch_shows_every_instance_once_when_the_attributes_are_equal():
    batches = Batches(made_up([40, 40, 40]), BUCKETS, 12, 2, seed=0)
    for epoch in range(3):
        seen = np.concatenate([numbers(batches[epoch * 10 + step]).ravel() for step in range(10)])
        assert sorted(seen) == list(range(120))


def test_a_small_attribute_repeats_and_a_large_one_takes_turns():
    batches = Batches(made_up([50, 1]), BUCKETS, 8, 1, seed=0)
    seen = [numbers(batches[step]).ravel() for step in range(5 * batches.steps_per_epoch)]
    assert all((rows == 50).sum() == 1 for rows in seen)
    assert len(set(np.concatenate(seen))) == 51


def test_a_data_set_smaller_than_a_batch_fills_it_by_repetition():
    batches = Batches(made_up([3, 2]), BUCKETS, 16, 1, seed=0)
    assert batches.steps_per_epoch == 1 and set(numbers(batches[0]).ravel()) == set(range(5))


def test_instances_with_several_labels_are_drawn_once_and_keep_all_labels():
    labels = np.array([[0, 1], [1, 0], [-1, 1], [-1, 0]] * 5)
    batches = Batches(made_up([10, 10], labels=labels), BUCKETS, 10, 1, seed=0)
    for step in range(2):
        assert np.array_equal(batches[step]["labels"][0], labels[numbers(batches[step])[0]])
        assert sorted(batches[step]["labels"][0][:, 0] >= 0) == [False] * 5 + [True] * 5


def test_an_attribute_that_occurs_only_beside_another_is_in_every_batch():
    labels = np.array([[0, -1]] * 95 + [[1, 1]] * 5)
    batches = Batches(made_up([50, 50], labels=labels), BUCKETS, 10, 1, seed=0)
    for step in range(10):
        assert np.all((batches[step]["labels"][0] >= 0).any(axis=0))


def test_instances_without_a_label_are_drawn_as_those_of_one_more_attribute():
    labels = np.array([[-1, -1]] * 70 + [[0, -1]] * 20 + [[-1, 1]] * 10)
    batches = Batches(made_up([50, 50], labels=labels), BUCKETS, 10, 1, seed=0)
    for step in range(10):
        known = batches[step]["labels"][0] >= 0
        assert known.sum(axis=0).tolist() == [2, 1] and (~known.any(axis=1)).sum() == 7
    assert sorted(np.concatenate([numbers(batches[step])[0] for step in range(10)])) == list(range(100))
    nothing_known = Batches(made_up([50, 50], labels=np.full((100, 2), -1)), BUCKETS, 10, 1, seed=0)
    assert sorted(np.concatenate([numbers(nothing_known[step])[0] for step in range(10)])) == list(range(100))
    beside = [[1, 1, -1], [1, -1, 1]] * 3 + [[-1, 1, -1], [-1, -1, 1]] * 2  # attribute 0 only beside rarer ones
    batches = Batches(made_up([40, 40, 20], labels=beside + [[-1] * 3] * 90), BUCKETS, 10, 1, seed=0)
    assert all((batches[step]["labels"][0, :, 0] >= 0).any() for step in range(20))
    few = np.array([[-1, -1]] * 1000 + [[0, -1]] + [[-1, 1]])
    batches = Batches(made_up([501, 501], labels=few), BUCKETS, 10, 1, seed=0)
    assert all((batches[step]["labels"][0] >= 0).sum(axis=0).tolist() == [1, 1] for step in range(100))


def test_batches_refuse_what_cannot_be():
    data = made_up([5, 5, 5])
    with pytest.raises(UserError, match="the data has 3 attributes, but a micro-batch .* only 2 instances"):
        Batches(data, BUCKETS, 4, 2, seed=0)
    unlabelled = made_up([5, 5], labels=[[0, -1], [-1, 0], [-1, -1], [-1, -1], [-1, -1]] * 2)
    with pytest.raises(UserError, match="the data has 2 attributes and instances without one, but .* only 2 instances"):
        Batches(unlabelled, BUCKETS, 2, 1, seed=0)
    with pytest.raises(UserError, match="tokens are up to .* but the last of data.buckets is"):
        Batches(data, BUCKETS[:1], 6, 1, seed=0)


# ------------------------------------------------------------------------------------------------ buckets


def test_a_step_has_the_smallest_bucket_that_holds_its_rows_and_few_shapes_occur():
    data = made_up([70, 50, 40])
    batches = Batches(data, BUCKETS, 12, 1, seed=0)
    shapes, places, tokens = set(), 0, 0
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        needed = [batch[f"{name}_length"].max() for name in FIELDS]
        fitting = [bucket for bucket in BUCKETS if all(n <= b for n, b in zip(needed, bucket, strict=True))]
        assert batches.bucket(step) == fitting[0] == tuple(batch[name].shape[-1] for name in FIELDS)
        shapes.add(fitting[0])
        places += sum(batch[name].size for name in FIELDS)
        tokens += sum(batch[f"{name}_length"].sum() for name in FIELDS)
    assert len(shapes) == 3
    assert batches.padding_fraction == pytest.approx(1 - tokens / places)


def test_padding_is_near_what_it_would_be_with_every_instance_in_its_own_bucket():
    data = made_up([700, 500, 400])
    batches = Batches(data, BUCKETS, 32, 1, seed=0)
    least = 1 - data.lengths.sum() / np.array(BUCKETS)[batches.bucket_of].sum()
    assert least <= batches.padding_fraction + 1e-3
    assert batches.padding_fraction < least + 0.02 < Batches(data, BUCKETS[-1:], 32, 1, seed=0).padding_fraction - 0.07


def test_batches_have_short_and_long_texts_in_equal_parts():
    data = made_up([700, 500, 400])
    batches = Batches(data, BUCKETS[-1:], 32, 1, seed=0)
    totals = [batches[step]["joint_length"].sum() for step in range(batches.steps_per_epoch)]
    by_chance = data.lengths[:, 1].std() * 32**0.5
    assert np.std(totals) < by_chance / 4


# ------------------------------------------------------------------------------------------------ packing


def test_packed_batches_say_where_their_tokens_are():
    data = made_up([70, 50, 40])
    plain, batches = (Batches(data, BUCKETS, 24, 2, seed=1, shares=shares) for shares in (0, 2))
    for step in range(3 * batches.steps_per_epoch):
        batch, expected = batches[step], plain[step]
        assert same({name: batch[name] for name in expected}, expected)
        extra = batch.keys() - expected.keys()
        assert extra <= {f"{name}_tokens" for name in FIELDS} and (extra or step >= batches.steps_per_epoch)
        for name in extra:
            field = name.removesuffix("_tokens")
            rows, length = (expected[key].reshape(2, 2, 6, -1) for key in (field, f"{field}_length"))
            assert batch[name].shape[:2] == (2, 2) and batch[name].dtype == np.int32
            for group, share in np.ndindex(2, 2):
                width = rows.shape[-1]
                places = [r * width + place for r in range(6) for place in range(length[group, share, r, 0])]
                assert batch[name][group, share].tolist() == places + [-1] * (batch[name].shape[-1] - len(places))


def test_a_bucket_has_one_packed_shape_and_rarely_needs_its_padded_one():
    batches = Batches(made_up([700, 500, 400]), BUCKETS, 32, 1, seed=0, shares=2)
    steps, shapes = 10 * batches.steps_per_epoch, {bucket: [] for bucket in BUCKETS}
    for step in range(steps):
        tokens = {name: array.shape for name, array in batches[step].items() if name.endswith("_tokens")}
        shapes[batches.bucket(step)].append(tuple(sorted(tokens.items())))
    for found in shapes.values():
        assert len(set(found)) <= 2 and found.count(()) <= len(found) / 50


def test_packing_leaves_little_padding_and_says_how_much():
    data = made_up([700, 500, 400])
    plain, batches = (Batches(data, BUCKETS, 32, 1, seed=0, shares=shares) for shares in (0, 1))
    places = tokens = 0
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        places += sum(batch.get(f"{name}_tokens", batch[name]).size for name in FIELDS)
        tokens += sum(batch[f"{name}_length"].sum() for name in FIELDS)
    assert batches.padding_fraction == pytest.approx(1 - tokens / places)
    assert batches.padding_fraction < plain.padding_fraction / 2


def test_a_batch_with_more_tokens_than_there_is_room_for_is_left_as_it_is():
    data = made_up([70, 50, 40])
    plain, batches = (Batches(data, BUCKETS[-1:], 24, 1, seed=1, shares=shares) for shares in (0, 2))
    step = next(step for step in range(6) if batches[step].keys() != plain[step].keys())
    batches._room[-1, 1] = batches._filled(batches._place(step)[0])[..., 1].max() - 1
    assert same(batches[step], plain[step])


@pytest.mark.parametrize("shares", [2, 4, 8])
def test_devices_that_share_a_batch_have_tokens_in_equal_parts(shares):
    data = made_up([700, 500, 400])
    batches = Batches(data, BUCKETS[-1:], 32, 1, seed=0)
    lengths = np.concatenate([batches[step]["joint_length"] for step in range(batches.steps_per_epoch)])
    totals = lengths.reshape(len(lengths), shares, -1).sum(axis=-1)
    by_chance = data.lengths[:, 1].std() * (32 / shares) ** 0.5
    assert totals.std() < by_chance / 2


def test_texts_that_fill_their_bucket_are_not_packed():
    data = made_up([60, 60], lengths=[[38, 57, 19]] * 120)
    batches = Batches(data, BUCKETS[:1], 24, 1, seed=0, shares=1)
    assert same(batches[0], Batches(data, BUCKETS[:1], 24, 1, seed=0)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_pack_their_own_rows(processes):
    whole = Batches(made_up([70, 50, 40]), BUCKETS, 24, 2, seed=1, shares=4)
    parts = [
        Batches(made_up([70, 50, 40]), BUCKETS, 24, 2, 1, np.arange(12).reshape(processes, -1)[p], shares=4)
        for p in range(processes)
    ]
    for step in (0, 5, 6, 20):
        assert any(name.endswith("_tokens") for name in whole[step])
        assert same(joined([part[step] for part in parts], axis=1), whole[step])


def test_what_frozen_encoders_have_read_and_what_follows_a_prompt_is_not_packed(run):
    batches = Batches(made_up([70, 50, 40]), BUCKETS, 24, 1, seed=1, shares=1)
    batches.columns = {"context_mean": np.zeros((160, 2), np.float32)}
    assert {name for name in batches[0] if name.endswith("_tokens")} == {"joint_tokens", "reply_tokens"}
    seeing = dataclasses.replace(run, decoder=dataclasses.replace(run.decoder, sees_context=True, context_tokens=9))
    batches = Batches(pipeline.prepare(seeing).train, run.data.buckets, 12, 1, seed=0, shares=1)
    names = {name for step in range(8) for name in batches[step] if name.endswith("_tokens")}
    assert names == {"context_tokens", "joint_tokens"}


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_shows_only_those_that_count():
    data = made_up([20, 17])
    among = data.labels[:, 1] >= 0
    batches = list(evaluation_batches(data, BUCKETS, 8, among=among))
    seen = np.concatenate([batch["context"][batch["weight"] > 0, 0] for batch in batches])
    assert len(batches) == 3 and sorted(seen) == list(range(20, 37))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_shows_every_instance_once(processes):
    data = made_up([20, 17])
    parts = [evaluation_batches(data, BUCKETS, 8, own) for own in np.arange(8).reshape(processes, -1)]
    batches = [joined(list(part), axis=0) for part in zip(*parts, strict=True)]
    assert len(batches) == 5
    seen = np.concatenate([batch["context"][batch["weight"] > 0, 0] for batch in batches])
    assert sorted(seen) == list(range(37))
    for batch in batches:
        kept = batch["weight"] > 0
        assert set(batch["weight"]) <= {0.0, 1.0} and batch["weight"].dtype == np.float32
        assert np.array_equal(batch["labels"][kept], data.labels[batch["context"][kept, 0]])
        assert np.array_equal(batch["turn"][kept], data.turns[batch["context"][kept, 0]])
    last = batches[-1]
    assert last["weight"].tolist() == [1] * 5 + [0] * 3
    assert np.all(last["labels"][5:] == -1) and np.all(last["reply_length"][5:] == 1)
    assert np.all(last["context_length"][5:] >= 1)  # no mean over nothing


# ------------------------------------------------------------------------------------------------ preparing


def test_lengths_are_computed_once_for_given_tokenizers_and_limits(run, corpus, monkeypatch):
    built = dialogues.build(dataset.sources(run.data)[0], corpus.schema, run.data.cache)
    computed = []
    index = TokenisedDialogues._index
    monkeypatch.setattr(TokenisedDialogues, "_index", lambda self: computed.append(1) or index(self))
    again = TokenisedDialogues(built, corpus.tokenizers, run.data.buckets[-1])
    assert not computed and np.array_equal(again.lengths, corpus.train.lengths)
    TokenisedDialogues(built, corpus.tokenizers, (100, 200, 64))
    assert len(computed) == 1
    wider = dataclasses.replace(run, encoder=config.Bert(vocab_size=900))
    pipeline.prepare(wider)
    assert len(computed) == 3  # training and validation data, for another tokenizer


def test_the_key_tells_data_and_tokenizers_apart(run, corpus):
    assert pipeline.prepare(run).key == corpus.key
    assert pipeline.prepare(run, corpus.tokenizers).key == corpus.key
    assert pipeline.prepare(dataclasses.replace(run, encoder=config.Bert(vocab_size=900))).key != corpus.key
    less = dataclasses.replace(run.data, train=run.data.train[:2])
    assert pipeline.prepare(dataclasses.replace(run, data=less), corpus.tokenizers).key != corpus.key


def test_training_without_validation_files_is_refused(run):
    data = dataclasses.replace(run.data, validation=())
    with pytest.raises(UserError, match="data.validation is not.*--data.validation language_style=FILE.jsonl"):
        pipeline.prepare(dataclasses.replace(run, data=data))


def test_four_attributes_of_which_one_has_three_aspects(tmp_path):
    lines = {
        "pace": ["slow", "fast"], "tone": ["warm", "cold"], "length": ["short", "middle", "long"], "age": ["old", "new"]
    }  # fmt: skip
    schema = "".join(f"[[attribute]]\nname = '{name}'\naspects = {aspects}\n" for name, aspects in lines.items())
    (tmp_path / "schema.toml").write_text(schema)
    files = []
    for name, aspects in lines.items():
        turns = [(aspect, f"{aspect} {n}") for aspect in aspects for n in range(4)]
        rows = [{"input": [f"{name}?"], "output": [reply], "tag": aspect} for aspect, reply in turns]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        files.append(f"{name}={tmp_path / name}")
    data = config.Data(tuple(files), tuple(files), str(tmp_path / "schema.toml"), cache=str(tmp_path / "cache"))
    run = config.Config(data=data, encoder=config.Bert(vocab_size=400), decoder=config.Gpt2(vocab_size=400))
    corpus = pipeline.prepare(run)
    assert corpus.schema.sizes == (2, 2, 3, 2) and len(corpus.train) == 36
    batch = Batches(corpus.train, run.data.buckets, 9, 1, seed=0)[0]
    assert (batch["labels"][0] >= 0).sum(axis=0).tolist() == [2, 2, 3, 2]
    assert corpus.train.labels.max(axis=0).tolist() == [1, 1, 2, 1]


# ------------------------------------------------------------------------------------------------ frozen


def test_a_frozen_corpus_gives_the_same_batches_without_tfds_and_grain(run, corpus, tmp_path):
    path = tmp_path / "frozen.npz"
    examples.save_frozen(path, corpus)
    frozen = pipeline.prepare(dataclasses.replace(run, data=dataclasses.replace(run.data, frozen=str(path))))
    assert frozen.schema == corpus.schema and frozen.key == corpus.key
    assert frozen.tokenizers.files() == corpus.tokenizers.files()
    a, b = (Batches(c.train, run.data.buckets, 12, 1, seed=0) for c in (corpus, frozen))
    assert all(same(a[step], b[step]) for step in range(12))
    for c, d in zip(
        evaluation_batches(corpus.validation, run.data.buckets, 7),
        evaluation_batches(frozen.validation, run.data.buckets, 7), strict=True,
    ):  # fmt: skip
        assert same(c, d)
    code = """
        import sys
        for name in ("grain", "tensorflow_datasets", "array_record", "transformers", "tyro"):
            sys.modules[name] = None  # importing it fails
        from miracle_jax import config, pipeline
        corpus = pipeline.prepare(config.Config(data=config.Data(frozen=sys.argv[1])))
        stream = pipeline.Batches(corpus.train, ((160, 224, 64),), 12, 1, 0).stream(5)
        print(next(stream)["reply"].sum())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    expected = Batches(corpus.train, ((160, 224, 64),), 12, 1, 0)[5]["reply"].sum()
    assert done.stdout == f"{expected}\n", done.stderr


def test_frozen_files_that_do_not_fit_are_refused(run, corpus, tmp_path):
    path = tmp_path / "frozen.npz"
    examples.save_frozen(path, corpus)
    data = config.Data(frozen=str(path), buckets=((80, 128, 40),))
    frozen = pipeline.prepare(config.Config(data=data))
    with pytest.raises(UserError, match="freeze the data again for these buckets"):
        Batches(frozen.train, data.buckets, 12, 1, 0)
    with pytest.raises(UserError, match="encoder tokenizer has 1000 tokens, but encoder.vocab_size is 500"):
        pipeline.prepare(config.Config(data=data, encoder=config.Bert(vocab_size=500)))
    with pytest.raises(UserError, match="none.npz does not exist"):
        examples.load_frozen(tmp_path / "none.npz")
    for size in (0, 10, path.stat().st_size // 2):
        (tmp_path / "half.npz").write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="half.npz is not a whole file of"):
            examples.load_frozen(tmp_path / "half.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(UserError, match="other.npz is not a whole file of"):
        examples.load_frozen(tmp_path / "other.npz")


def test_the_bundled_schema_is_the_default(corpus):
    assert corpus.schema == Schema.load()


def test_an_attribute_that_occurs_only_beside_rarer_ones_is_in_every_batch():
    labels = [[0, 1, -1]] * 30 + [[-1, 1, 0]] * 30 + [[0, -1, -1]] * 20 + [[-1, -1, 1]] * 20
    batches = Batches(made_up([100, 0, 0], labels=labels), BUCKETS, 4, 1, seed=0)
    for step in range(100):
        assert (batches[step]["labels"] >= 0).any(axis=(0, 1)).all()
