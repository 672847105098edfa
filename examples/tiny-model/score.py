"""Exact-answer scores of the tiny model, as it is or with weights and activations rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from encoding import Encoder, Sequence
from tasks import Example
from torch import nn

GROUP_SIZE = 32

Rounding = Callable[[str, torch.Tensor], torch.Tensor]


def int4_weights(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight after rounding: linear layers int4 in groups of 32 inputs, embedding int8 per row, others as is."""
    if weight.ndim != 2:
        return weight
    if "embed" in name:
        return _symmetric(weight, bits=8)
    return _symmetric(weight.reshape(-1, GROUP_SIZE), bits=4).reshape(weight.shape)


def _symmetric(rows: torch.Tensor, bits: int) -> torch.Tensor:
    largest = 2 ** (bits - 1) - 1
    scales = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / largest
    return (rows / scales).round().clamp(-largest - 1, largest) * scales


@contextmanager
def quantized(model: nn.Module, weights: Rounding | None = None, activations: bool = False) -> Iterator[None]:
    """Within, the model computes with rounded weights, and linear layers with inputs rounded to 8 bits per token.

    Gradients are those of the rounded weights: a straight-through estimate for the weights themselves.
    """
    kept = {}
    with ExitStack() as stack:
        if weights is not None:
            for name, parameter in model.named_parameters():
                kept[name] = parameter.data.clone()
                parameter.data.copy_(weights(name, parameter.data))
        if activations:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    handle = module.register_forward_pre_hook(lambda _, inputs: (_eight_bits(inputs[0]),))
                    stack.callback(handle.remove)
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.data.copy_(kept[name])


def _eight_bits(inputs: torch.Tensor) -> torch.Tensor:
    """Asymmetric, one scale and zero point for each token, as dynamic quantization does at run time."""
    low = inputs.amin(dim=-1, keepdim=True).clamp_max(0)
    high = inputs.amax(dim=-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-10)
    zero = (-128 - low / scale).round()
    return ((inputs / scale + zero).round().clamp(-128, 127) - zero) * scale


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example], *, weights: Rounding | None = None,
             activations: bool = False) -> float:
    """The share of examples that greedy decoding answers exactly, the end of the turn included."""
    with quantized(model, weights, activations):
        return sum(exact_answers(model, examples)) / len(examples)


def exact_answers(model: nn.Module, examples: list[Example], rows: int = 32) -> list[bool]:
    """For each example, in the order given, whether greedy decoding writes the answer and then ends.

    One pass tells: greedy decoding is exact if and only if every token of the answer has the largest logit
    after those before it.
    """
    encoder = Encoder()
    pairs = [(index, encoder(e.conversation()), len(e.answer)) for index, e in enumerate(examples)]
    pairs.sort(key=lambda pair: len(pair[1].ids))
    results = [False] * len(examples)
    for start in range(0, len(pairs), rows):
        chunk = pairs[start: start + rows]
        ids = padded([sequence for _, sequence, _ in chunk])
        guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)  # [B, T]
        for row, (index, sequence, length) in enumerate(chunk):
            end = len(sequence.ids) - 1  # the template's newline after <|im_end|>
            begin = end - 1 - length
            results[index] = torch.equal(guesses[row, begin - 1: end - 1], ids[row, begin:end])
    return results


def padded(sequences: list[Sequence]) -> torch.Tensor:
    """Token ids [B, T], padded on the right, where a causal model does not look."""
    longest = max(len(sequence.ids) for sequence in sequences)
    return torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in sequences])
