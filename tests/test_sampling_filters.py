"""Sampling against transformers' own logits processors, and what a checkpoint or a user asks for."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.sampling import Sampling
from tests.helpers import fill_bundle, hf_model
from tests.test_sampling import Says

CASES = [
    {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.7, "top_k": 5}, {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_p": 0.05}, {"temperature": 0.3, "min_p": 0.15},
    {"temperature": 1.0, "min_p": 1.0}, {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},  # as LFM2's model cards have it
    {"temperature": 0.1, "top_k": 50, "repetition_penalty": 1.1},  # and LFM3's
    {"temperature": 1.0, "top_k": 400, "repetition_penalty": 0.8},
]


def theirs(logits, seen, temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities, float32 [vocab], by the processors that transformers' `generate` puts together, in its order."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    scores = processors(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_probabilities_are_those_of_transformers(case, spread):
    random = np.random.default_rng(len(str(case)))
    for _ in range(20):
        logits = (random.normal(size=300) * spread).astype(np.float32)
        seen = random.integers(300, size=40).tolist()
        sampling = Sampling(**case)

        tokens, shares = sampling.candidates(sampling._penalized(logits, set(seen)))
        ours = np.zeros(300)
        ours[tokens] = shares

        expected = theirs(logits, seen, **case)
        assert ((ours > 0) == (expected > 0)).all()
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-7)


def test_equals_of_the_last_of_the_top_k_stay_as_transformers_has_them():
    logits = np.float32([3, 1, 1, 1, 0])

    tokens, _ = Sampling(1.0, top_k=2).candidates(logits)

    assert sorted(tokens) == np.flatnonzero(theirs(logits, [0], 1.0, top_k=2)).tolist() == [0, 1, 2, 3]


def test_the_greedy_answer_with_a_penalty_is_transformers():
    """Through its whole `generate`, over a prompt that the penalty counts, too."""
    model, prompt = hf_model(), [1, 5, 9, 200, 31, 5]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, repetition_penalty=1.3, max_new_tokens=30,
                              eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    sampling, taken = Sampling(repetition_penalty=1.3), list(prompt)

    while len(taken) < len(prompt) + 30:
        with torch.no_grad():
            logits = model(torch.tensor([taken])).logits[0, -1].numpy()
        taken.append(sampling.next_token(logits, set(taken), np.random.default_rng(0)))

    assert taken[len(prompt):] == expected
    assert len(set(expected)) > len(set(greedy(model, prompt)))


def greedy(model, prompt):
    return model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=None,
                          pad_token_id=0)[0, len(prompt):].tolist()


@pytest.mark.parametrize("file", [
    {}, {"temperature": 0.3, "min_p": 0.15}, {"do_sample": False, "temperature": 0.3, "repetition_penalty": 1.05},
    {"do_sample": True}, {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
    {"do_sample": True, "top_k": 0, "top_p": 0.9}, {"do_sample": True, "top_k": None, "temperature": None}], ids=str)
def test_a_generation_config_means_what_it_means_to_transformers(tmp_path, file):
    """Which filters, with which values, its `generate` would make of the file."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, **file}))
    model = hf_model()
    config, _ = model._prepare_generation_config(GenerationConfig.from_pretrained(tmp_path))
    made = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    logits = (np.random.default_rng(1).normal(size=300) * 2).astype(np.float32)
    expected = made(torch.tensor([[1, 5, 9, 200]]), torch.from_numpy(logits)[None].clone())[0]

    sampling = Sampling.of_generation_config(file)
    scores = sampling._penalized(logits, {1, 5, 9, 200})

    assert bool(config.do_sample) == (sampling.temperature > 0)
    if not config.do_sample:
        assert sampling.next_token(logits, {1, 5, 9, 200}, np.random.default_rng(0)) == int(expected.argmax())
        return
    tokens, shares = sampling.candidates(scores)
    np.testing.assert_allclose(shares, expected.softmax(-1).numpy()[tokens], rtol=1e-4)
    assert len(tokens) == int((expected > -np.inf).sum())


@pytest.mark.parametrize("file, complaint", [
    ({"temperature": "warm"}, "generation_config.json: temperature is 'warm'"), ({"top_k": 2.5}, "top_k is 2.5"),
    ({"do_sample": True, "top_p": 3}, "generation_config.json: top_p is 3; it must be above 0, at most 1"),
    ({"min_p": True}, "min_p is True; expected a number")])
def test_a_generation_config_that_is_none_is_one_line(file, complaint):
    with pytest.raises(LfmEdgeError, match=complaint):
        Sampling.of_generation_config(file)


@pytest.mark.parametrize("given, expected", [
    ({}, Sampling()), ({"temperature": 0.7}, Sampling(0.7)), ({"top_k": 5}, Sampling(1.0, top_k=5)),
    ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
    ({"temperature": 0.0, "top_p": 0.5}, Sampling(0.0, top_p=0.5))])
def test_what_a_user_gives_without_a_word_of_the_checkpoint_s(given, expected):
    assert Sampling().changed(**given, min_p=None) == expected


def test_what_a_user_gives_takes_the_place_of_what_the_checkpoint_says():
    says = Sampling(0.3, min_p=0.15, repetition_penalty=1.05)

    assert says.changed(top_k=40) == Sampling(0.3, 40, min_p=0.15, repetition_penalty=1.05)
    assert says.changed(temperature=0.0).temperature == 0.0


@pytest.mark.parametrize("value", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
                                   {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0},
                                   {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}], ids=str)
def test_values_that_are_none_are_refused(value):
    name, = value
    with pytest.raises(LfmEdgeError, match=f"^{name} is .*; it must be"):
        Sampling(**value)


def test_a_bundle_says_what_its_makers_say(tmp_path):
    from lfm_edge import open_bundle

    (tmp_path / "generation_config.json").write_text("{}")
    fill_bundle(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.3, "min_p": 0.15}))
    bundle = open_bundle_anew(tmp_path)

    assert bundle.sampling == Sampling(0.3, 50, min_p=0.15)
    bundle.manifest.files.pop("generation_config.json")
    assert bundle.sampling == Sampling()
    assert open_bundle(tmp_path).sampling != Sampling()


def open_bundle_anew(directory):
    """Sealed again, as it is now."""
    from lfm_edge.bundle.bundle import Bundle

    Bundle.open(directory, check=False).manifest.write(directory)
    return Bundle.open(directory)


def test_draws_follow_the_probabilities_and_the_seed():
    from lfm_edge import generate

    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.125] + [1e-9] * 296))

    def drawn(seed):
        return list(generate(Says(logits), [1], max_tokens=60, sampling=Sampling(1.0), seed=seed))

    assert drawn(3) == drawn(3) != drawn(4)
    counts = np.bincount([token for seed in range(20) for token in drawn(seed)], minlength=4)
    assert (np.diff(counts[:3]) < 0).all()
