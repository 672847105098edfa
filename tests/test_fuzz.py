"""Files that are not trusted, damaged in every way: each opens, or is refused by one line of ours.

Valid files are changed where they have structure (any value at any depth becomes an awkward one) and where they have
none (bytes flipped, cut off, put in). The `heavy` run tries many times as many.
"""

import copy
import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_edge.bundle.bundle import open_bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.calibration.gptq import read_windows
from lfm_edge.calibration.sample import read_tasks
from lfm_edge.checkpoint import sandbox
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import CHATML_TEMPLATE, TextTokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.tables import bundle_table
from lfm_edge.quantization.recipe import MixedBits
from lfm_edge.session.saved import Origin, SavedSession
from lfm_edge.session.state import Snapshot
from tests.helpers import fill_bundle, save_checkpoint
from tests.untrusted_helpers import header_of, signed, with_header

MESSAGES = [{"role": "user", "content": "Who is there?"}]
LONGEST_LINE = 1100

runs = pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.heavy)])


class Raw(str):
    """Text that goes into JSON as it is."""


AWKWARD = st.sampled_from([
    None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 60, -(1 << 63), 1 << 200, 0.5, 1e308, Raw("1e999"), Raw("NaN"),
    Raw("-Infinity"), Raw("9" * 5000), "", "x", "nn", "..", "/etc/passwd", "../../x", "a\0b", "\n\x1b[31m", "\ud800",
    "é" * 300, "x" * 100_000, [], {}, [[]], [None], [1 << 60] * 4, {"": None}, {"x": {"y": [1, 2, {"z": 3}]}},
    Raw("[" * 5000 + "]" * 5000), Raw('{"a": 1, "a": 2}')])


def awkward(draw):
    """One of them, in a copy: the next change may be one in it."""
    return copy.deepcopy(draw(AWKWARD))


def places(value, path=()):
    """The path of every value in JSON."""
    yield path
    if not isinstance(value, (dict, list)):
        return
    for key, item in (value.items() if isinstance(value, dict) else enumerate(value)):
        yield from places(item, (*path, key))


@st.composite
def damaged_json(draw, value):
    """JSON text of `value` with one to three values replaced, removed, renamed, or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(value) if path]
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        holder = value
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "put in"]))
        if kind == "remove":
            del holder[last]
        elif kind == "replace":
            holder[last] = awkward(draw)
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "__class__", "../x", "\ud800"]))] = awkward(draw)
        else:
            holder.insert(0, awkward(draw))
    return spelled(value)


def spelled(value):
    """As json.dumps does, with Raw as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelled, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged_bytes(draw, content):
    """A file with a few bytes changed, the end cut off, or bytes put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.sampled_from([b"\xff\xfe", b"\0" * 8, b"[" * 3000, b'"', b"\xf0", b"{{"]))
        else:
            content[place:place] = content[place:place + 40]
    return bytes(content)


def damaged(content):
    """A JSON file, damaged in its structure or in its bytes."""
    as_text = damaged_json(json.loads(content)).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(as_text, as_text, damaged_bytes(content))


def opens_or_is_refused(use):
    """Whether it opens. Raises where it ends in something else than one line of ours."""
    try:
        use()
    except LfmEdgeError as error:
        line = str(error)
        assert line.isprintable() and 0 < len(line) < LONGEST_LINE
        return False
    return True


def fuzz(strategy, examples, check):
    """Try examples of a strategy, the same ones on every run."""
    settings(max_examples=examples)(given(strategy)(check))()


# --- bundles ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "bundle"
    directory.mkdir()
    (directory / "README.md").write_text("# A bundle")
    fill_bundle(directory)
    return directory


@runs
def test_a_manifest(bundle, examples):
    path, tried = bundle / "manifest.json", []
    original = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        tried.append(opens_or_is_refused(lambda: use_bundle(open_bundle(bundle))))

    try:
        fuzz(damaged(original), examples, check)
    finally:
        path.write_bytes(original)
    assert len(set(tried)) == 2  # some are harmless


def use_bundle(opened):
    """What is done with a manifest before anything runs."""
    bundle_table(opened)
    assert all(path.is_relative_to(opened.directory) for path in (opened.artifact, opened.listed("tokenizer.json")))
    assert sum(tensor.nbytes for tensor in opened.manifest.state.fresh()) == opened.manifest.state.nbytes
    assert all(math.isfinite(low + high) for low, high in opened.manifest.decoder.activation_ranges.values())


@runs
def test_tokenizer_files(bundle, tmp_path, examples):
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (bundle / name).read_bytes() for name in names}

    def check(change):
        name, content = change
        (tmp_path / name).write_bytes(content)
        opens_or_is_refused(lambda: use_tokenizer(TextTokenizer(tmp_path)))
        (tmp_path / name).write_bytes(files[name])

    for name in names:
        (tmp_path / name).write_bytes(files[name])
    fuzz(st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name]))), examples, check)


def use_tokenizer(tokenizer):
    ids = tokenizer.chat(MESSAGES)
    tokenizer.decode(tokenizer.encode("Who is there?") + ids)


PIECES = st.sampled_from([
    "{% for a in range(99999) %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{% macro m() %}", "{{ m() }}",
    "{% endmacro %}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{% set x = 'xxxxxxxx' %}",
    "{% set x = x ~ x %}", "{% set x = x + x %}", "{{ x }}", "{{ x|replace('x', x) }}", "{{ 'x' * 999999999 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ [1] * 99999 }}", "{{ 'x'|center(9999999999) }}", "{{ lipsum(n=99999) }}",
    "{{ '%999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}", "{{ '{:999999999}'.format(1) }}",
    "{{ messages }}", "{{ messages[0].__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ bos_token }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y' * 9) }}", "{% include 'manifest.json' %}",
    "{% import 'os' as os %}"])


@runs
def test_chat_templates(bundle, tmp_path, monkeypatch, examples):
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    shutil.copyfile(bundle / "tokenizer.json", tmp_path / "tokenizer.json")

    def check(content):
        (tmp_path / "chat_template.jinja").write_bytes(content)
        opens_or_is_refused(lambda: TextTokenizer(tmp_path).chat(MESSAGES))

    parts = st.lists(PIECES, max_size=8).map(lambda parts: "".join(parts).encode())
    fuzz(st.one_of(parts, damaged_bytes(CHATML_TEMPLATE.encode())), examples, check)


@runs
def test_tasks_and_windows_and_recipes(tmp_path, examples):
    (tmp_path / "config").mkdir()
    fill_bundle(tmp_path / "config")
    config = Manifest.read(tmp_path / "config").config
    readers = {"tasks.json": (lambda: read_tasks(tmp_path), [{"task": "a", "messages": MESSAGES, "answer": "b"}]),
               "calibration.json": (lambda: read_windows(tmp_path, config), {"windows": [[1, 2], [3, 4]]}),
               "recipe.json": (lambda: MixedBits.read(tmp_path / "recipe.json").to_dict(),
                               {"group_size": 32, "head_bits": 8, "linear_bits": {"a": 4, "b": 8}})}

    def check(change):
        name, content = change
        (tmp_path / name).write_bytes(content)
        opens_or_is_refused(readers[name][0])

    fuzz(st.sampled_from(list(readers)).flatmap(
        lambda name: st.tuples(st.just(name), damaged(json.dumps(readers[name][1]).encode()))), examples, check)


# --- saved sessions -----------------------------------------------------------------------------------------------


@runs
def test_a_saved_session(bundle, tmp_path, examples):
    spec, path = Manifest.read(bundle).state, tmp_path / "saved"
    state = Snapshot(spec, 2, tuple(tensor.kept(tensor.fresh(), 2) for tensor in spec.tensors), (5, 6))
    SavedSession(Origin("0" * 64), state, ({"role": "user", "content": "x"},)).write(path)
    original = path.read_bytes()
    header, data = header_of(original)

    def check(content):
        path.write_bytes(content)
        opens_or_is_refused(lambda: SavedSession.read(path))

    inner = damaged_json(json.loads(header["__metadata__"]["state"])).map(
        lambda text: with_header({**header, "__metadata__": {**header["__metadata__"], "state": text}}, data))
    outer = damaged_json(header).map(lambda text: with_text(text, data))
    fuzz(st.one_of(inner.map(signed), outer.map(signed), damaged_bytes(original), damaged_bytes(original).map(signed)),
         examples, check)


def with_text(text, data):
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("fuzz") / "model", max_shard_size="100KB")


@runs
def test_the_json_files_of_a_checkpoint(checkpoint, examples):
    names = ("config.json", "model.safetensors.index.json", "tokenizer_config.json")
    files = {name: (checkpoint / name).read_bytes() for name in names}

    def check(change):
        name, content = change
        (checkpoint / name).write_bytes(content)
        try:
            opens_or_is_refused(lambda: use_checkpoint(open_checkpoint(checkpoint), checkpoint.parent / "bundle"))
        finally:
            (checkpoint / name).write_bytes(files[name])

    fuzz(st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name]))), examples, check)


def use_checkpoint(opened, bundle):
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    opened.copy_text_files(bundle)
    opened.tensor(opened.names[0])


@runs
def test_the_header_of_a_safetensors_file(tmp_path, examples):
    save_checkpoint(tmp_path, layer_types=["conv"])
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    header, data = header_of(original)

    def check(content):
        path.write_bytes(content)
        opens_or_is_refused(lambda: use_weights(open_checkpoint(tmp_path)))

    front = original[:len(original) - len(data)]
    fuzz(st.one_of(damaged_json(header).map(lambda text: with_text(text, data)),
                   damaged_bytes(front).map(lambda content: content + data)), examples, check)


def use_weights(opened):
    assert all(opened.tensor(name).shape == torch.Size(shape) for name, shape in opened.config.weight_shapes().items())


def test_what_is_tried_is_damaged_in_structure_and_in_bytes():
    """The strategies themselves: what they give is not what they were given."""
    original = json.dumps({"a": [1, {"b": 2}]}).encode()
    seen = set()
    fuzz(damaged(original), 100, lambda content: seen.add(content))
    are_json = [is_json(content) for content in seen]
    assert len(seen) > 50 and any(are_json) and not all(are_json) and original not in seen


def is_json(content):
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True
