"""The network over static shapes, in torch: padded chunks and single tokens compute what the reference computes."""

import numpy as np
import pytest
import torch

from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import ExportError
from lfm_edge.model.static import StaticLowering, StaticProgram
from lfm_edge.quantization.recipe import recipe
from lfm_edge.session.state import APPEND, StateLayout, StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import ALL_AT_ONCE, AWKWARD, save_checkpoint

CONTEXT, CHUNK = 40, 8
STEPS = (8, 5, 1, 1, 3, 8, 2, 8, 1, 3)  # tokens; together they fill the context
TOKENS = [5 + 7 * index % 250 for index in range(CONTEXT)]
LAYOUT = StateLayout(kv_heads_first=True, conv_channels_last=True)


class Host:
    """Drives the programs for a chunk and for one token, as an app would."""

    def __init__(self, config, weights, dtype):
        self.spec = StateSpec.of(config, CONTEXT, dtype, LAYOUT, dtype)
        lowerings = [StaticLowering(length, getattr(torch, dtype)) for length in (CHUNK, 1)]
        self.programs = {lowering.length: StaticProgram(config, weights, self.spec, lowering)
                         for lowering in lowerings}
        self.state, self.position = self.spec.fresh(), 0

    def step(self, tokens):
        length = CHUNK if len(tokens) > 1 else 1
        padded = torch.tensor([tokens + [9] * (length - len(tokens))], dtype=torch.int32)
        place = [self.position] if length == 1 else [self.position, len(tokens)]
        with torch.no_grad():
            logits, *following = self.programs[length](
                padded, *(torch.tensor([number], dtype=torch.int32) for number in place), *self.state)
        for index, (tensor, value) in enumerate(zip(self.spec.tensors, following, strict=True)):
            if tensor.update == APPEND:
                self.state[index][:, :, self.position:self.position + len(tokens)] = value[:, :, :len(tokens)]
            else:
                self.state[index] = value
        self.position += len(tokens)
        return logits[0, 0].float().numpy()


def largest_error(source, dtype):
    """In standard deviations of the reference's logits, over all steps."""
    checkpoint = open_checkpoint(source)
    weights = quantize_checkpoint(checkpoint, recipe(4, 32, 8, "float"))
    reference = ReferenceSession(checkpoint.config, weights, StateSpec.of(checkpoint.config, CONTEXT))
    host, start, errors = Host(checkpoint.config, weights, dtype), 0, []
    for count in STEPS:
        part, start = TOKENS[start:start + count], start + count
        expected = reference.prefill(part)
        errors.append(np.abs(host.step(part) - expected).max() / expected.std())
    assert start == CONTEXT
    return max(errors)


@pytest.mark.parametrize("name", [*AWKWARD, "all at once"])
def test_float32_agrees_with_the_reference_on_awkward_models(tmp_path, name):
    source = save_checkpoint(tmp_path / "model", **AWKWARD.get(name, ALL_AT_ONCE))
    assert largest_error(source, "float32") < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.05), ("bfloat16", 0.4)])
def test_16_bit_types_stay_within_their_roundings(tmp_path, dtype, limit):
    source = save_checkpoint(tmp_path / "model", **ALL_AT_ONCE)
    assert 0 < largest_error(source, dtype) < limit


def test_the_trace_has_no_size_that_is_not_constant(tmp_path):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    weights = quantize_checkpoint(checkpoint, recipe(4, 32, 8, "float"))
    program = Host(checkpoint.config, weights, "float16").programs[CHUNK]
    shapes = [node.meta["val"].shape for node in program.trace().graph.nodes
              if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(shapes) > 100 and all(isinstance(size, int) for shape in shapes for size in shape)
    assert len(program.input_names()) == 3 + len(program.decoder.state.tensors)
    assert program.output_names()[:2] == ["logits", "present_conv.0"]


def test_float_weights_are_refused(tmp_path):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    with pytest.raises(ExportError, match="bundles are quantized"):
        Host(checkpoint.config, float_weights(checkpoint), "float32")
