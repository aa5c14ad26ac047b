"""Perplexity against a closed form and against transformers on the same weights."""

import checkpoints
import numpy as np
import parity
import pytest

from miracle_jax.errors import UserError
from miracle_jax.fluency import LanguageModel, perplexity, released_perplexity

CASES = ["gpt2_silu", "llama_untied"]
TEXTS = ["w3 w4 w5 w9", "w7", "", "w11 w2", "w5 " * 17]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("lm") / "model", parity.load(request.param))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path):
    case = parity.load("gpt2_silu")
    nothing = {name: np.zeros_like(tensor) for name, tensor in checkpoints.tensors(case).items()}
    scores = LanguageModel(str(checkpoints.write(tmp_path / "model", case, nothing))).score(TEXTS)
    assert scores[:, 1].tolist() == [4, 1, 0, 2, 17]
    np.testing.assert_allclose([perplexity(*score) for score in scores[[0, 3, 4]]], checkpoints.ROWS, rtol=1e-5)
    np.testing.assert_allclose(released_perplexity(*scores[3]), checkpoints.ROWS**0.5, rtol=1e-5)


def test_what_cannot_be_predicted_has_no_perplexity(folder):
    scores = LanguageModel(str(folder)).score(["w7", ""])
    assert [perplexity(*score) for score in scores] == [None, None]
    assert [released_perplexity(*score) for score in scores] == [None, None]


def test_the_released_code_drops_perplexities_from_ten_thousand_on():
    assert released_perplexity(2 * np.log(9999), 2) == pytest.approx(9999)
    assert released_perplexity(2 * np.log(10001), 2) is None
    assert perplexity(np.log(10001), 2) == pytest.approx(10001)


def test_a_text_has_one_score_whatever_stands_beside_it(folder):
    model = LanguageModel(str(folder))
    together = model.score(TEXTS)
    alone = np.concatenate([model.score([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_a_text_beyond_the_positions_is_cut(folder):
    model = LanguageModel(str(folder))
    long, cut = model.score(["w5 w6 " * 30, "w5 w6 " * 10])
    assert long[1] == checkpoints.POSITIONS
    np.testing.assert_array_equal(long, cut)


@pytest.mark.torch
def test_transformers_agrees(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = LanguageModel(str(folder))
    scores = ours.score(TEXTS)
    for text, (nats, number) in zip(TEXTS, scores, strict=True):
        ids = torch.tensor([ours.tokenizer.encode(text)])
        assert number == ids.shape[1]
        if number > 1:
            with torch.no_grad():
                loss = model(ids, labels=ids).loss.item()
            assert nats == pytest.approx(loss * (number - 1), rel=1e-4)
            assert released_perplexity(nats, number) == pytest.approx(np.exp(loss * (number - 1) / number), rel=1e-4)


def test_an_encoder_is_no_language_model(tmp_path):
    bert = checkpoints.write(tmp_path / "bert", parity.load("bert_gelu"))
    with pytest.raises(UserError, match="--language-model .* is a 'bert' model; decoders of the GPT-2 and Llama"):
        LanguageModel(str(bert))
