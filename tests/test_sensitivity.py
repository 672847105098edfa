"""Sensitivity: what each part of a model costs at 4 bits, and bits chosen under a size limit."""

import itertools
import json

import pytest
import torch

from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.sample import text_windows
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import ExportError, LfmEdgeError
from lfm_edge.harness.quality import compare
from lfm_edge.harness.sensitivity import (
    Cost,
    Sensitivity,
    Whole,
    choose,
    decided_together,
    divergences,
    measure,
    recipe_bytes,
    whole,
)
from lfm_edge.quantization.recipe import EMBEDDING, UNTIED_HEAD, MixedBits, recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.client_helpers import tasks
from tests.helpers import ALL_AT_ONCE, TINY, hf_config, lfm_edge, save_checkpoint


def conversations(picked):
    """Windows of what the trained model is for."""
    tokenizer = TextTokenizer(TINY)
    tokens = [token for task in picked for token in (
        *tokenizer.chat(task["messages"]), *tokenizer.encode(task["answer"], special=False), 7)]
    return torch.tensor([tokens[start:start + 256] for start in range(0, len(tokens) - 256, 256)])


@pytest.fixture(scope="module")
def tiny():
    return open_checkpoint(TINY)


@pytest.fixture(scope="module")
def found(tiny):
    return measure(tiny, conversations(tasks(each=60)[::2])[:6])


def test_recipes_compared_in_one_walk_have_the_divergences_that_each_has_alone(tmp_path):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, tie_word_embeddings=False,
                                                 layer_types=["conv", "full_attention", "conv"]))
    config = checkpoint.config
    windows = torch.arange(40).view(2, 20) + 20
    mixed = {"model.layers.1.self_attn.k_proj.weight": 4, "model.layers.2.conv.in_proj.weight": 4}
    recipes = {"4": recipe(4, 32, 4, "float"), "8": recipe(8, 32, 8, "float"), "head": recipe(8, 32, 4, "float"),
               "mixed": recipe(8, 32, 8, "float", mixed=mixed)}

    def alone(weights):
        session = ReferenceSession(config, weights, StateSpec.of(config, 20))
        return [session.score(window) for window in windows.tolist()]

    exact = alone(float_weights(checkpoint))
    for key, found in divergences(checkpoint, recipes, windows).items():
        expected = compare(windows.tolist(), exact, alone(quantize_checkpoint(checkpoint, recipes[key])), 1.0)
        assert found == pytest.approx(expected.kl_divergence, rel=1e-3), key


def test_parts_are_all_quantized_weights_once_and_those_of_one_input_are_together():
    config = ModelConfig.from_dict(hf_config(layer_types=["conv", "full_attention"], tie_word_embeddings=False)
                                   .to_dict())
    parts = decided_together(config)
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(name for name, shape in config.weight_shapes().items() if len(shape) == 2)
    together = [{name.split(".", 3)[-1] for name in part} for part in parts if len(part) > 1]
    feed_forward = {"feed_forward.w1.weight", "feed_forward.w3.weight"}
    assert together == [{EMBEDDING.split(".", 3)[-1], UNTIED_HEAD.split(".", 3)[-1]}, feed_forward,
                        {f"self_attn.{part}_proj.weight" for part in "qkv"}, feed_forward]


def test_the_bytes_are_those_of_codes_and_two_byte_scales(tiny):
    for made in (recipe(4, 32, 8, "float"), recipe(8, 32, 4, "float"),
                 recipe(4, 128, 8, "float", mixed={"model.layers.3.feed_forward.w2.weight": 8})):
        weights = quantize_checkpoint(tiny, made).values()
        assert recipe_bytes(made, tiny.config.weights()) == sum(
            w.ints.numel() * w.bits // 8 + 2 * w.scales.numel() if isinstance(w, QuantizedTensor) else 4 * w.numel()
            for w in weights)


def test_every_part_has_a_cost_and_what_they_save_is_all_there_is_to_save(tiny, found):
    assert [cost.weights for cost in found.costs] == decided_together(tiny.config)
    assert sum(cost.bytes_saved for cost in found.costs) == found.eight_bits.nbytes - found.four_bits.nbytes
    assert max(cost.kl_divergence for cost in found.costs) < found.four_bits.kl_divergence
    assert found.eight_bits.kl_divergence < 0.1 * found.four_bits.kl_divergence


def test_under_the_size_of_uniform_groups_of_32_a_mix_loses_a_third_less(tiny):
    """Larger groups and 8 bits where they matter most; on text that the choice was not made on."""
    ours, others = conversations(tasks(each=60)[::2]), conversations(tasks(each=60)[1::2])[:12]
    uniform = recipe(4, 32, 8, "float")
    size = recipe_bytes(uniform, tiny.config.weights())
    bits = choose(measure(tiny, ours[:6], 64), size)
    mixed = whole(tiny, bits, others)
    assert mixed.nbytes <= size
    assert mixed.kl_divergence < 0.75 * divergences(tiny, {"uniform": uniform}, others)["uniform"]


def test_a_tenth_more_bytes_save_half_of_what_4_bits_cost(tiny, found):
    uniform = recipe(4, 32, 8, "float")
    size = recipe_bytes(uniform, tiny.config.weights())
    others = conversations(tasks(each=60)[1::2])[:12]
    mixed = whole(tiny, choose(found, int(1.1 * size)), others)
    assert mixed.nbytes <= 1.1 * size
    assert mixed.kl_divergence < 0.5 * divergences(tiny, {"uniform": uniform}, others)["uniform"]


def made_up(costs):
    """A model of parts that cost (KL divergence, bytes), the embedding first."""
    names = [EMBEDDING, *(f"model.layers.{index}.w.weight" for index in range(len(costs) - 1))]
    rows = [Cost((name,), *cost) for name, cost in zip(names, costs, strict=True)]
    saved, lost = (sum(getattr(row, part) for row in rows) for part in ("bytes_saved", "kl_divergence"))
    return Sensitivity("made up", 1, 32, Whole(1000 + saved, 0.0), Whole(1000, lost), rows)


@pytest.mark.parametrize("limit", range(1000, 1101, 9))
def test_no_other_choice_within_the_limit_has_a_smaller_sum(limit):
    costs = [(0.5, 20), (0.1, 3), (0.9, 17), (-0.01, 5), (0.4, 22), (0.05, 9), (0.2, 9), (0.3, 15)]
    found = made_up(costs)
    bits = choose(found, limit)

    def total(large):
        """Bytes and KL divergence with the parts of `large` at 8 bits."""
        return (1000 + sum(cost.bytes_saved for cost in large),
                found.four_bits.kl_divergence - sum(cost.kl_divergence for cost in large))

    ours = total([cost for cost in found.costs if bits.bits_of(cost.weights[0]) == 8])
    every = [total(large) for count in range(len(costs) + 1) for large in itertools.combinations(found.costs, count)]
    assert ours[0] <= limit
    assert ours[1] == pytest.approx(min(divergence for size, divergence in every if size <= limit))


def test_a_limit_below_4_bits_everywhere_is_refused():
    with pytest.raises(LfmEdgeError, match=r"--max-size: the weights take 0\.00 MB at 4 bits everywhere"):
        choose(made_up([(0.5, 20)]), 999)


def test_an_awkward_model_is_measured(tmp_path):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, **ALL_AT_ONCE))
    found = measure(checkpoint, torch.arange(30).view(1, 30) + 20)
    middle = (found.four_bits.nbytes + found.eight_bits.nbytes) // 2
    assert whole(checkpoint, choose(found, middle), torch.arange(30).view(1, 30) + 20).nbytes <= middle


# --- the recipe's file --------------------------------------------------------------------------------------------


def test_a_choice_survives_its_file(tmp_path, tiny, found):
    bits = choose(found, 900_000)
    (tmp_path / "bits.json").write_text(json.dumps(bits.to_dict()))
    assert MixedBits.read(tmp_path / "bits.json") == bits


@pytest.mark.parametrize("content, message", [
    ("[]", "expected an object"), ("{", "not JSON"), ("{}", "group_size is None"),
    ('{"group_size": 48}', "group_size is 48"), ('{"group_size": 32, "head_bits": 5}', "head_bits is 5"),
    ('{"group_size": 32, "head_bits": 8}', "linear_bits is missing"),
    ('{"group_size": [32], "head_bits": {}}', "group_size is"),
    ('{"group_size": 32, "head_bits": 8, "linear_bits": {"a": "4"}}', "a has '4' bits"),
    ('{"group_size": 32, "head_bits": 8, "linear_bits": {"a": [4]}}', "a has \\[4\\] bits"),
])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "bits.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        MixedBits.read(tmp_path / "bits.json")


@pytest.mark.parametrize("name", ["model.layers.99.conv.in_proj.weight", EMBEDDING, "model.layers.0.conv.conv.weight"])
def test_a_recipe_for_another_model_is_refused(tiny, name):
    other = {4: 8, 8: 4}
    for bits in (4, 8):
        with pytest.raises(ExportError, match="not a linear layer of this model"):
            quantize_checkpoint(tiny, recipe(bits, 32, 8, "float", mixed={name: other[bits]}))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_command_writes_a_recipe_that_export_takes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n")
    ended = lfm_edge("sensitivity", "--model", TINY, "--text", text, "--tokens", "40", "--max-size", "800kB",
                     "--output", tmp_path / "bits.json", "--json", "-")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["tokens"] == len(text_windows(TextTokenizer(TINY), 272, text.read_text(), 256, 40)[0])
    assert result["chosen"]["nbytes"] <= 800_000
    bits = json.loads((tmp_path / "bits.json").read_text())
    assert bits == {key: result[key] for key in ("group_size", "head_bits", "linear_bits")}

    exported = lfm_edge("export", "--target", "onnx-q4", "--model", TINY, "--context", "64", "--recipe",
                        tmp_path / "bits.json", "--output", tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr
    mixed = json.loads((tmp_path / "bundle/manifest.json").read_text())["recipe"]["mixed"]
    assert set(mixed) == {name for name, its in bits["linear_bits"].items() if its == 8} != set()
