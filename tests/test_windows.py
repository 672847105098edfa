"""Caches of sliding-window layers: which rows count, where they stand, what a step does to them, in every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.session.state import APPEND, RING, SHIFT, SLIDE, Snapshot, StateLayout, StateSpec
from tests.helpers import ALL_AT_ONCE_LFM3, lfm3_model

CONTEXT, CHUNK, WINDOW = 60, 5, ALL_AT_ONCE_LFM3["sliding_window"]
LAYOUTS = {
    APPEND: StateLayout(), RING: StateLayout(window=RING), SLIDE: StateLayout(kv_heads_first=True, window=SLIDE),
    SHIFT: StateLayout(kv_heads_first=True, conv_channels_last=True, window=SHIFT),
    "ring, keys last": StateLayout(kv_heads_first=True, keys_transposed=True, window=RING)}
CONFIG = ModelConfig.from_dict(lfm3_model(**ALL_AT_ONCE_LFM3).config.to_dict())
splits = st.lists(st.integers(1, CHUNK), min_size=1, max_size=14).filter(lambda sizes: sum(sizes) <= CONTEXT)


def spec(name, context=CONTEXT):
    return StateSpec.of(CONFIG, context, layout=LAYOUTS[name], chunk=CHUNK)


def key(name, context=CONTEXT):
    return next(tensor for tensor in spec(name, context).tensors if tensor.window and tensor.kind == "key")


def rows_of(tensor, positions):
    """Rows whose every number is their position, as a step gives them."""
    rows = torch.tensor(positions, dtype=torch.float32).view(*([1] * tensor.axis), -1,
                                                             *([1] * (3 - tensor.axis)))
    shape = list(tensor.shape)
    shape[tensor.axis] = len(positions)
    return rows.expand(shape).clone()


def take(tensor, value, position, count):
    """One step, as the runtime of that layout does it."""
    new = rows_of(tensor, range(position, position + count))
    if tensor.update == SHIFT:
        new = torch.cat([value, new], tensor.axis).narrow(tensor.axis, count, tensor.rows)
    if tensor.update == SLIDE:  # what is left moves to the beginning before the operator writes
        kept = tensor.kept(value, position)
        first = tensor._slots(position - kept.shape[tensor.axis], position, position + count)
        stays = first >= 0
        value.index_copy_(tensor.axis, first[stays], kept.index_select(tensor.axis, stays.nonzero().flatten()))
    tensor.update_with(value, new, position, count)


def positions_in(tensor, rows):
    return rows.movedim(tensor.axis, 0).flatten(1)[:, 0].tolist()


@pytest.mark.parametrize("name", LAYOUTS)
@given(sizes=splits)
def test_after_any_steps_the_rows_are_those_of_the_last_positions(name, sizes):
    tensor, position = key(name), 0
    value = tensor.fresh()
    for size in sizes:
        take(tensor, value, position, size)
        position += size
        kept = tensor.kept(value, position)
        assert kept.shape == tensor.kept_shape(position)
        assert positions_in(tensor, kept) == list(range(max(0, position - WINDOW), position))


@pytest.mark.parametrize("name", LAYOUTS)
@given(sizes=splits, count=st.integers(1, CHUNK))
def test_a_step_that_is_said_to_spare_what_counts_spares_it(name, sizes, count):
    tensor, position = key(name), 0
    value = tensor.fresh()
    for size in sizes:
        take(tensor, value, position, size)
        position += size
    if position + count > CONTEXT or not tensor.survives(position, count):
        return
    before = tensor.kept(value, position)
    take(tensor, value, position, count)
    assert torch.equal(tensor.kept(value, position), before)


def test_a_ring_has_room_for_a_window_and_a_step_so_that_any_step_can_be_taken_back():
    tensor = key(RING)
    assert tensor.rows == WINDOW + CHUNK
    assert all(tensor.survives(position, count) for position in range(CONTEXT) for count in range(1, CHUNK + 1))


@pytest.mark.parametrize("name", LAYOUTS)
@given(position=st.integers(0, CONTEXT))
def test_what_is_kept_is_put_back(name, position):
    tensor = key(name)
    kept = rows_of(tensor, range(max(0, position - WINDOW), position))
    value = tensor.fresh()
    tensor.put_back(value, kept, position)
    assert torch.equal(tensor.kept(value, position), kept)


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
@given(position=st.integers(0, CONTEXT))
def test_a_state_goes_from_every_layout_to_every_other_and_back(here, there, position):
    ours = spec(here)
    values = tuple(torch.randn(tensor.kept_shape(position)) for tensor in ours.tensors)
    snapshot = Snapshot(ours, position, values)
    back = snapshot.converted(spec(there)).converted(ours)
    assert all(torch.equal(a, b) for a, b in zip(values, back.tensors, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("taken", [0, 1, 3, 30])
def test_rows_are_repeated_up_to_a_position(name, taken):
    tensor = key(name)
    value = tensor.fresh()
    tensor.put_back(value, rows_of(tensor, range(max(0, taken - WINDOW), taken)), taken)
    tensor.repeat_rows(value, taken, CONTEXT)
    assert tensor.kept(value, CONTEXT).shape == tensor.kept_shape(CONTEXT)
    assert positions_in(tensor, tensor.kept(value, CONTEXT))[-1] in range(max(taken, 1))


@pytest.mark.parametrize(("name", "rows"), [(APPEND, 6), (RING, 6), (SHIFT, 6), (SLIDE, WINDOW)])
def test_a_context_shorter_than_the_window_takes_no_more_rows_than_it_has(name, rows):
    """But for ONNX Runtime's operator, which wants room for a whole window."""
    assert key(name, context=6).rows == rows


def test_the_layout_is_read_back_as_it_was_written():
    for name in LAYOUTS:
        assert StateSpec.from_dict(spec(name).to_dict()) == spec(name)


def test_a_model_without_windows_is_described_as_ever():
    config = ModelConfig.from_dict(lfm3_model(layer_types=["conv", "full_attention"]).config.to_dict())
    assert all("window" not in entry for entry in StateSpec.of(config, 32).to_dict()["tensors"])
