"""MIRACLE in JAX: personalised dialogue by energy-guided latents.

The files, in the order in which a sentence travels:

    config.py        every knob, once
    command_line.py  flags over a config, or over a run's settings
    errors.py        a user's mistake is one sentence
    reading.py       files that others wrote
    attributes.py    the schema: attributes and their aspects
    instructions.py  what a language model is asked for
    endpoint.py      a language model that is asked; responses.py reads what it sends
    journal.py       one record a job, durable
    asking.py        many jobs, each answered once
    collect.py       dialogues by a language model                      python -m miracle_jax.collect
    transcripts.py   what it wrote -> turns
    cleaning.py      rules, duplicates, language
    aspects.py       judges in two rounds; reviews.py is people's part
    toxicity.py      toxic dialogues
    card.py          the data card
    clean.py         a collection -> a corpus                           python -m miracle_jax.clean
    imports.py       other people's dialogues; messages.py and chitchat.py read them
    dataset.py       JSONL -> validated instances                       python -m miracle_jax.dataset
    dialogues.py     instances -> a TFDS (ArrayRecord) dataset
    storage.py       files and folders that are whole or absent
    overview.py      what a dataset holds, for people
    tokenizers.py    text <-> tokens
    examples.py      instances -> token rows
    pipeline.py      token rows -> batch(seed, step)
    layers.py        what all transformers share
    bert.py          the encoder
    latent.py        Gaussians and attribute heads
    decoder.py       the latent inside a decoder; gpt2.py and llama.py are its families
    cvae.py          the whole model, one forward
    losses.py        all losses and their schedules
    energy.py        E(P|z)
    sampler.py       the ODE and the other samplers
    descent.py       Eq. 20 for our own heads, fast
    exponential.py   a solver for Eq. 19, which is stiff
    slots.py         many rows through few places
    pieces.py        many rows in pieces, on a CPU one a core
    decode.py        latents -> tokens, in one compiled call
    hub.py           outside checkpoints as files; gguf_file.py reads llama.cpp's
    weights.py       other people's names for our parameters
    pretrained.py    starting from outside checkpoints
    cluster.py       processes that work together
    mesh.py          arrays over devices
    compiled.py      what JAX compiles is kept and told
    checkpoint.py    what is saved, and how
    report.py        what a run tells
    goodput.py       where its time goes
    preemption.py    SIGTERM
    loop.py          steps, checkpoints, and what can go wrong with them
    stages.py        before and after the CVAE: latents alone
    train.py         the training                                       python -m miracle_jax.train
    cost.py          products of a step as traced, collectives as compiled
    abstract.py      a step and its arguments as shapes
    chips.py         accelerators by their published figures
    plan.py          a step on hardware that is not here                python -m miracle_jax.plan
    model.py         load(workdir): a model to talk to
    generate.py      replies                                            python -m miracle_jax.generate
    metrics.py       BLEU, ROUGE, Distinct and self-BLEU
    fluency.py       perplexity under another language model
    judge.py         text classifiers of replies                        python -m miracle_jax.judge
    word_judges.py   such classifiers that need no checkpoint
    scores.py        all that is measured on replies
    predictions.py   replies of any system to a test set
    prompting.py     replies of a language model that is told           python -m miracle_jax.prompting
    systems.py       what is compared: runs in variants, files of replies
    significance.py  how sure a figure is
    tables.py        the report; figures.py draws it
    evaluate.py      systems against each other                         python -m miracle_jax.evaluate
    baseline.py      decoders without a latent, to be beaten            python -m miracle_jax.baseline
    ablation.py      the model without its parts                        python -m miracle_jax.ablation
    human.py         sheets for annotators, and their scores            python -m miracle_jax.human
    sheets.py        CSV that people fill in
    export.py        models out                                         python -m miracle_jax.export
    convert.py       checkpoints of the paper's code in                 python -m miracle_jax.convert
    env.py           what a bug report needs                            python -m miracle_jax.env
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - a checkout can be run without being installed
    raise ImportError(f"miracle_jax needs Python 3.11 or newer, this is {sys.version.split()[0]}")

__version__ = "0.1.0"
__all__ = ["Model", "Reply", "Schema", "load"]


def __getattr__(name: str):
    # Late, so that `python -m miracle_jax.dataset` or `.env` does not wait for JAX.
    if name in ("Model", "Reply", "load"):
        from miracle_jax import model

        return getattr(model, name)
    if name == "Schema":
        from miracle_jax.attributes import Schema

        return Schema
    raise AttributeError(f"module 'miracle_jax' has no attribute {name!r}")
