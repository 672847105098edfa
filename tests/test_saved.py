"""Saved sessions: a file brings back what was saved, or is refused with one line."""

import functools
import json
import os
import random
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.session.generation import Chat, generate
from lfm_edge.session.saved import _DIGEST_AT, _DIGEST_SIZE, Origin, SavedSession, _digest
from lfm_edge.session.state import APPEND, Snapshot, StateLayout, StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import REPO, hf_config, save_checkpoint

CONTEXT = 24
TOKENS = [5, 9, 250, 17, 30, 31, 200, 11, 12, 13]
ORIGIN = Origin("a" * 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def make_session(source):
    checkpoint = open_checkpoint(source)
    weights = float_weights(checkpoint)

    def make(kv_dtype="float32", context=CONTEXT):
        session = ReferenceSession(checkpoint.config, weights, StateSpec.of(checkpoint.config, context, kv_dtype))
        session.origin = ORIGIN
        return session

    return make


@pytest.fixture(scope="module")
def kept(make_session):
    """Sessions that tests of many examples use again."""
    return functools.cache(make_session)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "session.safetensors"


@pytest.fixture(scope="module")
def saved(make_session, tmp_path_factory):
    """The bytes of a saved session of ten tokens."""
    path = tmp_path_factory.mktemp("saved") / "session"
    session = make_session()
    session.prefill(TOKENS)
    session.save(path, [{"role": "user", "content": "hello"}])
    return path.read_bytes()


def refusal(session, file, error=BundleError):
    """The one line with which loading is refused; the session is then as it was."""
    before = session.snapshot()
    with pytest.raises(error) as raised:
        session.load(file)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)
    after = session.snapshot()
    assert (before.position, before.tokens) == (after.position, after.tokens)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, after.tensors, strict=True))
    return str(raised.value)


# --- there and back -----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(position=st.integers(0, CONTEXT), kv_dtype=st.sampled_from(["float32", "int8"]), seed=st.integers(0, 9))
def test_what_is_saved_is_what_is_loaded(kept, tmp_path_factory, position, kv_dtype, seed):
    session, file = kept(kv_dtype), tmp_path_factory.mktemp("any") / "session"
    session.reset()
    tokens = [random.Random(seed).randrange(300) for _ in range(position)]
    if tokens:
        session.prefill(tokens)
    snapshot = session.snapshot()
    session.save(file, [{"role": "user", "content": "Grüße 🙂\n"}])
    session.reset()
    messages = session.load(file)

    assert SavedSession.read(file).origin == ORIGIN
    assert (session.position, session.tokens) == (position, tokens)
    assert messages == [{"role": "user", "content": "Grüße 🙂\n"}]
    loaded = session.snapshot()
    assert loaded.spec == snapshot.spec
    assert all(torch.equal(a, b) for a, b in zip(snapshot.tensors, loaded.tensors, strict=True))


def test_a_loaded_session_answers_as_the_saved_one_would_have(make_session, file):
    first, second = make_session(), make_session()
    first.prefill(TOKENS)
    first.save(file)
    second.prefill([99, 98])
    second.load(file)
    assert list(generate(second, [7], max_tokens=8)) == list(generate(first, [7], max_tokens=8))


def test_a_session_knows_the_tokens_that_it_has_taken(make_session):
    session = make_session()
    session.prefill(TOKENS[:4])
    snapshot = session.snapshot()
    session.decode(8)
    assert session.tokens == [*TOKENS[:4], 8]
    session.restore(snapshot)
    assert session.tokens == TOKENS[:4]
    session.reset()
    assert session.tokens == []


def test_the_file_is_plain_safetensors_with_only_what_is_filled(make_session, saved, file):
    file.write_bytes(saved)
    tensors = load_file(file)
    assert tensors.pop("tokens").tolist() == TOKENS
    spec = make_session().spec
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        tensor.name: tensor.kept_shape(len(TOKENS)) for tensor in spec.tensors}


def test_the_same_session_gives_the_same_file(make_session, saved, file):
    session = make_session()
    session.prefill(TOKENS)
    session.save(file, [{"role": "user", "content": "hello"}])
    assert file.read_bytes() == saved


GO_ON = """
import sys
from lfm_edge import open_bundle
from lfm_edge.session.generation import generate
session = open_bundle(sys.argv[1]).session(threads=2)
session.load(sys.argv[2])
print(*generate(session, [40], max_tokens=12))
"""


def test_another_process_goes_on_with_another_number_of_threads(tiny_bundle, file):
    session = tiny_bundle.session(threads=1)
    session.prefill(tiny_bundle.tokenizer().encode("One beginning for two questions."))
    session.save(file)
    finished = subprocess.run([sys.executable, "-c", GO_ON, str(tiny_bundle.directory), str(file)], cwd=REPO,
                              capture_output=True, text=True, check=True)
    assert [int(token) for token in finished.stdout.split()] == list(generate(session, [40], max_tokens=12))


# --- another context, layout, type --------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [len(TOKENS), CONTEXT - 1, CONTEXT * 4])
def test_a_session_goes_on_in_any_context_that_holds_it(make_session, saved, file, context):
    file.write_bytes(saved)
    session, same = make_session(context=context), make_session()
    session.load(file)
    assert session.position == len(TOKENS)
    if context > len(TOKENS):
        same.load(file)
        torch.testing.assert_close(torch.tensor(session.decode(7)), torch.tensor(same.decode(7)))


def test_a_context_that_is_too_small_is_refused(make_session, saved, file):
    file.write_bytes(saved)
    assert "the session is 10 tokens long, the context here holds 9" in refusal(make_session(context=9), file)


def layout(keys_last=False, kv_dtype="float32", conv_dtype="float32", context=CONTEXT, **how):
    """The state of a small model in some layout; keys_last: keys transposed, as NPUs multiply them."""
    config = ModelConfig.from_dict(hf_config().to_dict())
    spec = StateSpec.of(config, context, kv_dtype, StateLayout(**how), conv_dtype)
    if not keys_last:
        return spec
    shape = (1, config.num_key_value_heads, config.head_dim, context)
    return replace(spec, tensors=tuple(replace(tensor, shape=shape, axis=3) if tensor.kind == "key" else tensor
                                       for tensor in spec.tensors))


LAYOUTS = {
    "positions first": layout(), "heads first": layout(kv_heads_first=True),
    "channels last": layout(kv_heads_first=True, conv_channels_last=True),
    "keys last": layout(kv_heads_first=True, keys_last=True), "longer": layout(context=99),
}


def some_state(spec, position):
    generator = torch.Generator().manual_seed(position)
    tensors = tuple(torch.randn(tensor.kept_shape(position), generator=generator).to(tensor.torch_dtype)
                    for tensor in spec.tensors)
    return Snapshot(spec, position, tensors, tuple(range(position)))


@settings(max_examples=60)
@given(here=st.sampled_from(sorted(LAYOUTS)), there=st.sampled_from(sorted(LAYOUTS)), position=st.integers(0, CONTEXT))
def test_every_layout_is_a_permutation_of_every_other(here, there, position):
    snapshot = some_state(LAYOUTS[here], position)
    moved = snapshot.converted(LAYOUTS[there])
    assert [value.shape for value in moved.tensors] == [
        tensor.kept_shape(position) for tensor in LAYOUTS[there].tensors]
    back = moved.converted(LAYOUTS[here])
    assert back.tokens == snapshot.tokens
    assert all(torch.equal(a, b) for a, b in zip(snapshot.tensors, back.tensors, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_converted_key_is_the_same_key(name):
    snapshot = some_state(LAYOUTS["positions first"], 6)
    index = next(i for i, tensor in enumerate(snapshot.spec.tensors) if tensor.kind == "key")
    other = snapshot.converted(LAYOUTS[name])
    axis = other.spec.tensors[index].axis
    for position in range(6):  # [1, kv_heads, head_dim] of one position, wherever that stands
        assert torch.equal(other.tensors[index].select(axis, position), snapshot.tensors[index].select(1, position))


def test_between_floating_point_types_values_are_rounded():
    snapshot = some_state(LAYOUTS["positions first"], 5)
    half = layout(kv_heads_first=True, kv_dtype="float16", conv_dtype="float16")
    assert all(torch.equal(a.half(), b) for a, b in zip(
        snapshot.converted(LAYOUTS["heads first"]).tensors, snapshot.converted(half).tensors, strict=True))


@pytest.mark.parametrize("there", ["float32", "int8"])
def test_eight_bit_caches_and_others_do_not_mix(make_session, file, there):
    session, other = make_session(there), make_session("int8" if there == "float32" else "float32")
    session.prefill(TOKENS)
    session.save(file)
    assert "past_key_values.1.key_scale: the KV types differ" in refusal(other, file)


def test_eight_bit_channels_and_others_do_not_mix():
    scaled = layout(kv_heads_first=True, kv_dtype="int8")
    with pytest.raises(BundleError, match=r"past_key_values.1.key is float32 there and int8 here"):
        some_state(LAYOUTS["heads first"], 3).converted(scaled)


def test_constant_scales_of_an_eight_bit_cache_must_be_the_same(make_session, file):
    session = make_session()
    session.origin = replace(ORIGIN, kv_scales_sha256="1" * 64)
    session.save(file)
    assert "other scales" in refusal(make_session(), file)


def test_another_models_session_is_refused(make_session, saved, file):
    file.write_bytes(saved)
    session = make_session()
    session.origin = Origin("b" * 64)
    assert "another model or recipe: its weights are aaaaaaaaaaaa..., this bundle's bbbbbbbbbbbb..." in refusal(session,
                                                                                                            file)


def test_a_session_of_no_bundle_is_not_saved(make_session, file):
    session = make_session()
    session.origin = None
    with pytest.raises(LfmEdgeError, match="only a session of a bundle"):
        session.save(file)
    assert not file.exists()


def test_a_position_that_no_tokens_led_to_is_not_saved(make_session, file):
    session = make_session()
    session.position = 5
    with pytest.raises(LfmEdgeError, match="at 5 and has taken 0 tokens"):
        session.save(file)
    assert not file.exists()


def test_state_inside_the_program_is_refused(make_session, saved, file):
    session = make_session()
    session.held = ()
    with pytest.raises(LfmEdgeError, match="export with --state explicit to save a session"):
        session.save(file)
    assert not file.exists()
    file.write_bytes(saved)
    with pytest.raises(LfmEdgeError, match="export with --state explicit to load a session"):
        session.load(file)


# --- writing ------------------------------------------------------------------------------------------------------


def test_an_older_file_is_replaced_and_nothing_is_left_beside_it(make_session, file, saved):
    file.write_bytes(b"older")
    session = make_session()
    session.prefill(TOKENS)
    session.save(file, [{"role": "user", "content": "hello"}])
    assert file.read_bytes() == saved
    assert list(file.parent.iterdir()) == [file]


def test_a_save_that_fails_leaves_the_older_file(make_session, saved, file, monkeypatch):
    file.write_bytes(saved)

    def full(self, out):
        out.write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(SavedSession, "_write", full)
    with pytest.raises(LfmEdgeError, match="cannot be written"):
        make_session().save(file)
    assert file.read_bytes() == saved
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("place", ["missing/session", ".", "x" * 300])
def test_a_place_that_cannot_be_written_is_one_line(make_session, tmp_path, place):
    with pytest.raises(LfmEdgeError, match="cannot be written"):
        make_session().save(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_behind_a_link_the_file_is_replaced_and_the_link_stays(make_session, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    make_session().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert make_session().load(tmp_path / "file") == []


# --- damage and malice --------------------------------------------------------------------------------------------


def resealed(content):
    """The bytes of a file with the digest that they should have."""
    import io

    file = io.BytesIO(content)
    digest = _digest(file)
    return content[:_DIGEST_AT] + digest + content[_DIGEST_AT + _DIGEST_SIZE:]


def with_header(content, change):
    """A file whose header somebody has edited, and who knows how to seal it."""
    size, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    return resealed(struct.pack("<Q", len(text)) + text + content[8 + size:])


def test_resealing_changes_nothing_that_is_right(saved):
    assert resealed(saved) == saved
    size, = struct.unpack("<Q", saved[:8])
    assert json.loads(saved[8:8 + size])["__metadata__"]["sha256"] == saved[_DIGEST_AT:][:_DIGEST_SIZE].decode()


@settings(max_examples=80)
@given(data=st.data())
def test_a_flipped_bit_is_found_anywhere(kept, saved, tmp_path_factory, data):
    bit = data.draw(st.integers(0, 8 * len(saved) - 1))
    broken = bytearray(saved)
    broken[bit // 8] ^= 1 << bit % 8
    file = tmp_path_factory.mktemp("flip") / "session"
    file.write_bytes(broken)
    assert refusal(kept(), file)


@settings(max_examples=40)
@given(data=st.data())
def test_a_file_that_is_cut_off_or_goes_on_is_refused(kept, saved, tmp_path_factory, data):
    end = data.draw(st.integers(0, len(saved) - 1))
    file = tmp_path_factory.mktemp("cut") / "session"
    for content in (saved[:end], saved + saved[:end] + b"x"):
        file.write_bytes(content)
        assert refusal(kept(), file)


@settings(max_examples=40)
@given(content=st.binary(max_size=300))
@example(b"")
def test_what_is_no_saved_session_is_refused(kept, tmp_path_factory, content):
    file = tmp_path_factory.mktemp("none") / "session"
    file.write_bytes(content)
    assert "not a saved session" in refusal(kept(), file)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_size_is_refused(make_session, saved, file, size):
    file.write_bytes(resealed(struct.pack("<Q", size) + saved[8:]))
    assert "malformed" in refusal(make_session(), file)


def test_what_cannot_be_read_is_refused(make_session, tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(make_session(), tmp_path / "missing")
    assert "cannot be read (Is a directory)" in refusal(make_session(), tmp_path)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
ENTRIES = ["format", "version", "position", "weights_sha256", "kv_scales_sha256", "state", "messages"]


@settings(max_examples=150)
@given(entry=st.sampled_from(ENTRIES), value=JSON | st.sampled_from(["-1", "11", "9" * 5000, "[" * 100_000]))
def test_a_header_made_to_confuse_is_refused(kept, saved, tmp_path_factory, entry, value):
    text = value if isinstance(value, str) else json.dumps(value)
    file = tmp_path_factory.mktemp("header") / "session"
    file.write_bytes(with_header(saved, lambda header: header["__metadata__"].update({entry: text})))
    if entry == "messages" and value == []:
        assert kept().load(file) == []
        kept().reset()
    else:
        assert refusal(kept(), file)


@settings(max_examples=150)
@given(key=st.sampled_from(["name", "layer", "kind", "shape", "dtype", "update", "initial", "axis"]), value=JSON,
       index=st.integers(0, 5))
def test_a_layout_made_to_confuse_brings_nothing_down(kept, saved, tmp_path_factory, key, value, index):
    def change(header):
        state = json.loads(header["__metadata__"]["state"])
        state["tensors"][index][key] = value
        header["__metadata__"]["state"] = json.dumps(state)

    file = tmp_path_factory.mktemp("layout") / "session"
    file.write_bytes(with_header(saved, change))
    session = kept()
    session.reset()
    try:
        session.load(file)
    except BundleError as error:
        assert "\n" not in str(error)
    assert session.position in (0, len(TOKENS))


@pytest.mark.parametrize("name, entry", [
    ("tokens", {"dtype": "I8", "shape": [40]}), ("tokens", {"dtype": "F32", "shape": [10]}),
    ("past_conv.0", {"dtype": "F32", "shape": [128]}), ("past_conv.0", {"dtype": "I32", "shape": [1, 64, 2]}),
    ("past_key_values.1.key", {"dtype": "F32", "shape": [1, 5, 4, 16]}),
    ("past_key_values.1.key", {"dtype": "F32", "shape": [10**18, 10**18, 10**18]}),
])
def test_a_tensor_that_is_not_what_the_layout_says_is_refused(make_session, saved, file, name, entry):
    file.write_bytes(with_header(saved, lambda header: header[name].update(entry)))
    assert refusal(make_session(), file)


def test_a_missing_tensor_an_unknown_token_and_another_version_are_refused(make_session, saved, file):
    file.write_bytes(with_header(saved, lambda header: header.update(other=header.pop("past_conv.2"))))
    assert "past_conv.2" in refusal(make_session(), file)
    session = make_session()
    session.prefill([299])
    session.save(file)
    smaller = make_session()
    smaller.vocab_size = 299
    assert "token 299 is outside the vocabulary of 299" in refusal(smaller, file)
    file.write_bytes(with_header(saved, lambda header: header["__metadata__"].update(version="3")))
    assert "format version 3; this lfm-edge reads 1 and 2" in refusal(make_session(), file)


# --- chat ---------------------------------------------------------------------------------------------------------


def chat_of(source, make_session):
    return Chat(make_session(context=256), TextTokenizer(source), (7,))


def test_a_conversation_goes_on_where_it_was_saved(source, make_session, file):
    first, second = chat_of(source, make_session), chat_of(source, make_session)
    list(first.answer("hello", max_tokens=4))
    first.save(file)
    second.load(file)
    assert second.messages == first.messages
    taken = len(second.session.tokens)
    assert list(second.answer("and now?", max_tokens=4)) == list(first.answer("and now?", max_tokens=4))
    assert second.session.tokens[:taken] == first.session.tokens[:taken]


def test_a_conversation_is_kept_in_a_file_from_the_first_moment(source, make_session, file):
    conversation = chat_of(source, make_session)
    with pytest.raises(KeyboardInterrupt), conversation.kept_in(file) as goes_on:
        assert not goes_on
        assert file.exists()
        list(conversation.answer("hello", max_tokens=4))
        raise KeyboardInterrupt
    with chat_of(source, make_session).kept_in(file) as goes_on:
        assert goes_on


def test_a_file_that_cannot_be_loaded_is_not_overwritten(source, make_session, file):
    file.write_bytes(b"years of work")
    with pytest.raises(BundleError), chat_of(source, make_session).kept_in(file):
        pass
    assert file.read_bytes() == b"years of work"


def test_a_session_of_no_conversation_is_no_chat(source, make_session, file):
    session = make_session(context=256)
    session.prefill(TOKENS)
    session.save(file)
    with pytest.raises(BundleError, match="without a conversation"):
        chat_of(source, make_session).load(file)


def test_an_answer_that_is_broken_off_does_no_harm(source, make_session):
    """What the session holds decides what is prefilled next, not what the answer would have been."""
    broken, whole = chat_of(source, make_session), chat_of(source, make_session)
    next(generate(broken.session, broken.tokenizer.chat([{"role": "user", "content": "hello"}]), max_tokens=4))
    assert list(broken.answer("what?", max_tokens=4)) == list(whole.answer("what?", max_tokens=4))


def test_only_caches_have_rows():
    for tensor in LAYOUTS["keys last"].tensors:
        assert (tensor.update == APPEND) == tensor.name.startswith("past_key_values")
