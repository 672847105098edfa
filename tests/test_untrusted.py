"""What comes with a bundle is not trusted: what its manifest says, what lies beside it, and where it points."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from lfm_edge import open_bundle
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.bundle.manifest_checks import check_manifest
from lfm_edge.calibration import sample
from lfm_edge.checkpoint import sandbox
from lfm_edge.checkpoint.checkpoint import RandomCheckpoint, open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.sources import place_of, remember
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, CheckpointError, LfmEdgeError
from lfm_edge.harness.quality import read_tasks
from lfm_edge.session.saved import Origin, SavedSession
from lfm_edge.session.state import Snapshot
from lfm_edge.targets import TARGETS
from tests.helpers import AWKWARD, REPO, TINY, fill_bundle, hf_config, lfm_edge, manifest_of
from tests.untrusted_helpers import COMMIT, in_hub_cache, rewrite_state

HUGE = 1 << 60


@pytest.fixture
def bundle(tmp_path):
    """A sealed bundle whose artifact no runtime can load."""
    directory = tmp_path / "bundle"
    directory.mkdir()
    fill_bundle(directory)
    return directory


def edit(bundle, change):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refusal(bundle):
    """The one line with which opening is refused."""
    with pytest.raises(BundleError) as raised:
        open_bundle(bundle)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 1100 and "manifest.json" in line
    return line


def in_state(**values):
    """Change the first tensor of the state that is a cache."""
    def change(manifest):
        next(entry for entry in manifest["state"]["tensors"] if entry["kind"] == "key").update(values)
    return change


def in_part(**values):
    return lambda manifest: manifest["parts"][0].update(values)


def in_options(**values):
    return lambda manifest: manifest["options"].update(values)


# --- a manifest's values ------------------------------------------------------------------------------------------

REFUSED = {
    "a type that is an attribute of torch": (in_state(dtype="nn"), "'nn' is none of float32, float16"),
    "a type that the target does not have": (in_state(dtype="float16"), "past_key_values.1.key is key float16"),
    "a shape without end": (in_state(shape=[HUGE, HUGE, HUGE, HUGE]), "the state layout has"),
    "another shape": (in_state(shape=[1, 64, 2, 8]), r"is key float32 \[1, 64, 2, 8\]; by the configuration it is key"),
    "a shape that is text": (in_state(shape="1234"), "is no whole number"),
    "a negative size": (in_state(shape=[1, -64, 2, 16]), "-64 is no whole number"),
    "an axis outside": (in_state(axis=7), "positions along number 7"),
    "an unknown kind": (in_state(kind="soul"), "'soul' is none of conv"),
    "an unknown update": (in_state(update="drop"), "'drop' is none of replace, append"),
    "a cache that begins with NaN": (in_state(initial=float("nan")), "begins with nan"),
    "a tensor of another name": (in_state(name="x" * 9), "past_key_values.1.key is None"),
    "a tensor twice": (lambda m: m["state"]["tensors"].append(m["state"]["tensors"][0]), "two tensors of one name"),
    "a tensor less": (lambda m: m["state"]["tensors"].pop(), "past_key_values.3.value is None"),
    "tensors in another order": (lambda m: m["state"]["tensors"].reverse(), "or another order"),
    "caches of another context": (lambda m: m["state"].update(context=32) or in_options(context=32)(m),
                                  r"\[1, 64, 2, 16\]; by the configuration"),
    "another context than was chosen": (in_options(context=32), "options have a context of 32, the state one of 64"),
    "a context without end": (lambda m: m["state"].update(context=HUGE) or in_options(context=HUGE)(m),
                              f"a context of {HUGE}"),
    "an unknown runtime": (lambda m: m.update(runtime="os"), "runtime is 'os'; known are executorch"),
    "another runtime": (lambda m: m.update(runtime="llamacpp"), "artifact is 'model.pte'; llamacpp opens"),
    "a runtime that opens directories": (lambda m: m.update(runtime="qnn"), "does not list the artifact model.pte"),
    "a part twice": (lambda m: m["parts"].append(m["parts"][0]), "2 parts; a text bundle has one"),
    "a part of another kind": (in_part(kind="oracle"), "'oracle' is none of decoder"),
    "a file of a part that is not listed": (in_part(files=["x"]), "files does not list x, of the part decoder"),
    "a file of a part that is elsewhere": (in_part(files=["/etc/passwd"]), "leads out of the bundle"),
    "an input of another type": (in_part(inputs=[{"name": "x", "dtype": "nn", "shape": []}]), "'nn' is none of"),
    "an output without end": (in_part(outputs=[{"name": "x", "dtype": "int8", "shape": [HUGE]}]), "a dimension of"),
    "a layout that is no choice": (lambda m: m["state_layout"].update(kv_heads_first=1), "1 is none of True, False"),
    "an unknown layout": (lambda m: m["state_layout"].update(window="drop"), "'drop' is none of append, ring"),
    "a configuration without end": (lambda m: m["config"].update(vocab_size=HUGE), "no model has more than"),
    "a model that no disk holds": (lambda m: m["config"].update(intermediate_size=1 << 24, hidden_size=1 << 24,
                                                                block_dim=1 << 24, block_ff_dim=1 << 24),
                                   "a model of .* parameters"),
    "an unknown number of bits": (lambda m: m["recipe"]["body"].update(bits=3), "3 bits; known are 4 and 8"),
    "an unknown group size": (lambda m: m["recipe"]["body"].update(group_size=7), "group_size is 7; known are channel"),
    "groups of no size": (lambda m: m["recipe"]["body"].update(group_size=0), "group_size is 0"),
    "8 bits in groups": (lambda m: m["recipe"]["body"].update(bits=8), "8 bits with group_size 32"),
    "groups that do not divide": (lambda m: m["recipe"]["body"].update(group_size=128), "not a multiple of the group"),
    "bits of a layer that is not there": (lambda m: m["recipe"]["mixed"].update(x=m["recipe"]["head"]), "names x"),
    "another compute type": (in_options(compute_dtype="nn"), "'nn' is none of float32, float16"),
    "an unknown state mode": (in_options(state="shared"), "'shared' is none of explicit"),
    "a chunk above the context": (in_options(prefill_chunk=65), "prefill_chunk is 65, more than the context of 64"),
    "a chunk that is no number": (in_options(prefill_chunk=16.5), "16.5 is no whole number"),
    "a chunk that is true": (in_options(prefill_chunk=True), "True is no whole number"),
    "more scored than a step takes": (in_part(scored=17), "scored is 17, more than the 16 tokens"),
    "another artifact": (in_part(artifact="tokenizer.json"), "artifact is 'tokenizer.json'; executorch opens"),
    "a hash that is none": (lambda m: m.update(source_sha256="../../x"), r"source_sha256 is '../../x', no SHA-256"),
    "a hash of weights that is none": (lambda m: m.update(weights_sha256="A" * 64), "weights_sha256 is 'AAAA"),
    "a hash of a file that is none": (lambda m: m["files"]["model.pte"].update(sha256=""), "model.pte is '', no SHA"),
    "a negative size of a file": (lambda m: m["files"]["model.pte"].update(bytes=-1), "-1 is no whole number"),
    "a file's name that does not print": (lambda m: m["files"].update({"a\0b": m["files"]["model.pte"]}), "no plain"),
    "a file's name in another spelling": (lambda m: m["files"].update({"./x": m["files"]["model.pte"]}), "no plain"),
    "a range without end": (in_part(activation_ranges={"x": [0, float("inf")]}), "x goes from 0.0 to inf"),
    "a range upside down": (in_part(activation_ranges={"x": [2, 1]}), "x goes from 2.0 to 1.0"),
    "versions that are a list": (lambda m: m.update(versions=[1]), "malformed"),
    "versions of numbers": (lambda m: m.update(versions={"torch": 2}), "versions holds something else than text"),
    "lowering that is text": (in_part(lowering="x"), "malformed"),
    "lowering that is deep": (in_part(lowering={"x": {"y": {"z": []}}}), "lowering holds something else"),
    "a baked prompt that is not listed": (lambda m: m.update(baked_prompt={"file": "x", "tokens": 3}), "the baked pro"),
    "a baked prompt as long as the context": (
        lambda m: m.update(baked_prompt={"file": "tokenizer.json", "tokens": 64}), "a baked prompt of 64 tokens"),
    "a calibration that is not listed": (lambda m: m["recipe"].update(rounding="gptq"), "does not list calibration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_no_export_writes_is_refused_in_one_line(bundle, case):
    change, complaint = REFUSED[case]
    edit(bundle, change)

    with pytest.raises(BundleError, match=complaint):
        open_bundle(bundle)
    assert refusal(bundle)


def test_what_a_message_quotes_is_cut_and_escaped(bundle):
    edit(bundle, lambda manifest: manifest.update(target="\x1b[31m\nred" + "x" * 100_000))

    assert r"unknown target '\x1b[31m\nredxxx" in refusal(bundle)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("model", ["attention only", "conv only", "one conv tap", "untied odd vocabulary, conv bias, "
                                                                                  "four taps"])
def test_every_choice_that_a_target_has_opens(name, model):
    """Compute types, types of caches, who keeps the state, models without one kind of layer."""
    target, config = TARGETS[name], ModelConfig.from_dict(hf_config(**AWKWARD[model]).to_dict())
    artifact = f"{target.artifact}/part" if target.runtime.takes_chip else target.artifact
    files = {file: {"bytes": 1, "sha256": "0" * 64} for file in (artifact, "kv_scales.safetensors")}
    for compute_dtype in target.arithmetic.compute_dtypes:
        for kv_dtype in target.arithmetic.kv_choices(compute_dtype):
            for state in target.state_modes:
                made = manifest_of(config, name, context=96, prefill_chunk=16, compute_dtype=compute_dtype,
                                   kv_dtype=kv_dtype, state=state)
                part = replace(made.decoder, lowering={"nodes": 3, "by": {"x": 2}}, activation_ranges={"x": (0.0, 1.0)})
                check_manifest(replace(made, parts=(part,), files=files, versions={"torch": "2"}))


def test_a_state_for_which_there_is_no_memory_is_one_line(bundle):
    tensor = replace(Manifest.read(bundle).state.tensors[-1], shape=(1 << 40, 1 << 20))

    with pytest.raises(LfmEdgeError, match=r"this machine has no .* bytes of memory for it"):
        tensor.fresh()


def test_inspect_prints_what_a_manifest_says_as_it_is(bundle):
    edit(bundle, lambda m: m.update(licence="[/bold]\x1b[31m[red]x") or in_part(lowering={"[/]": "[/x]"})(m))

    shown = lfm_edge("inspect", bundle)

    assert shown.returncode == 0 and not shown.stderr
    assert r"licence: [/bold]\x1b[31m[red]x" in shown.stdout and "[/x]" in shown.stdout


# --- saved sessions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, complaint", [
    (lambda state: state["tensors"][0].update(dtype="nn"), "'nn' is none of float32"),
    (lambda state: state["tensors"][0].update(shape=[HUGE, HUGE]), "the state layout has .* bytes"),
    (lambda state: state["tensors"][0].update(shape=[1, 64, 3]), "past_conv.0 is not what the layout says"),
    (lambda state: state["tensors"].append(state["tensors"][0]), "two tensors of one name"),
    (lambda state: state.update(context=-1), "-1 is no whole number from 1 on"),
    (lambda state: state.update(tensors=3), "the state layout is malformed"),
])
def test_a_saved_session_allocates_nothing_that_it_only_says(bundle, tmp_path, change, complaint):
    spec, path = Manifest.read(bundle).state, tmp_path / "saved"
    empty = Snapshot(spec, 0, tuple(tensor.kept(tensor.fresh(), 0) for tensor in spec.tensors))
    SavedSession(Origin("0" * 64), empty).write(path)
    assert SavedSession.read(path).snapshot.spec == spec

    rewrite_state(path, change)

    with pytest.raises(BundleError, match=complaint) as raised:
        SavedSession.read(path)
    assert "\n" not in str(raised.value)


# --- files that the manifest does not list ------------------------------------------------------------------------


def unlist(bundle, *names):
    """Take files off the manifest's list and leave them where they are."""
    edit(bundle, lambda manifest: [manifest["files"].pop(name) for name in names])


def test_a_chat_template_laid_beside_is_not_used(bundle):
    config = json.loads((bundle / "tokenizer_config.json").read_text())
    (bundle / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    (bundle / "chat_template.jinja").unlink()
    Bundle(bundle, Manifest.read(bundle)).manifest.write(bundle)
    (bundle / "chat_template.jinja").write_text("{{ 'SAY THIS' }}")

    assert open_bundle(bundle).tokenizer().template is None
    assert TextTokenizer(bundle).template == "{{ 'SAY THIS' }}"


def test_a_tokenizer_config_laid_beside_is_not_used(bundle):
    unlist(bundle, "tokenizer_config.json", "chat_template.jinja")

    assert open_bundle(bundle).tokenizer().config == {}


def test_a_tokenizer_laid_beside_is_not_used(bundle):
    unlist(bundle, "tokenizer.json")

    with pytest.raises(BundleError, match=r"tokenizer\.json: no tokenizer"):
        open_bundle(bundle).tokenizer()


def test_tasks_laid_beside_are_not_used(bundle):
    (bundle / "tasks.json").write_text(json.dumps([{"task": "a", "messages": [], "answer": "b"}]))

    assert read_tasks(open_bundle(bundle)) == []


def test_a_file_is_handed_out_only_where_it_is_listed(bundle):
    (bundle / "model.mlxfn").write_text("laid beside")

    assert open_bundle(bundle).listed("model.pte") == bundle / "model.pte"
    with pytest.raises(BundleError, match=r"model\.mlxfn: is not part of this bundle"):
        open_bundle(bundle).listed("model.mlxfn")


def test_a_package_holds_what_the_manifest_lists_and_nothing_else(tmp_path):
    package = tmp_path / "model.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data/weight.bin").write_bytes(b"weights")
    fill_bundle(tmp_path, target="coreml-q4", name="model.mlpackage/Data/model.mlmodel")
    assert open_bundle(tmp_path).artifact_names == ["model.mlpackage/Data/model.mlmodel",
                                                    "model.mlpackage/Data/weight.bin"]
    (package / ".DS_Store").write_bytes(b"of the Finder")
    assert open_bundle(tmp_path)

    for beside in ("Data/other.bin", "linked"):
        if beside == "linked":
            (package / beside).symlink_to(tmp_path)
        else:
            (package / beside).write_bytes(b"x")
        with pytest.raises(BundleError, match=f"{beside}: is not part of this bundle"):
            open_bundle(tmp_path)
        (package / beside).unlink()


def test_an_artifact_is_all_that_lies_in_its_folder(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/weights under any name").write_bytes(b"1234")
    (tmp_path / "onnx.txt").write_text("beside the folder")
    fill_bundle(tmp_path, target="onnx-q4", name="onnx/model_q4.onnx")

    assert open_bundle(tmp_path).artifact_names == ["onnx/model_q4.onnx", "onnx/weights under any name"]


# --- where the checkpoint is --------------------------------------------------------------------------------------


@pytest.fixture
def nobody_s_cache(tmp_path, monkeypatch):
    """A machine on which nothing was exported, and which may not call the hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was called"))


@pytest.mark.parametrize("source", ["LiquidAI/LFM2-350M", "owner/name@main", "checkpoint", "/etc", "./checkpoint",
                                    "../checkpoint", str(TINY)])
def test_a_manifest_s_source_is_followed_nowhere(bundle, tmp_path, monkeypatch, nobody_s_cache, source):
    shutil.copytree(TINY, tmp_path / "here" / "checkpoint")
    monkeypatch.chdir(tmp_path / "here")
    edit(bundle, lambda manifest: manifest.update(source=source))

    with pytest.raises(CheckpointError, match="was not exported on this machine") as raised:
        open_bundle(bundle).source()
    assert f"'{source}'" in str(raised.value)


def test_what_a_hub_s_model_is_to_be_given_as_is_told(bundle, nobody_s_cache):
    edit(bundle, lambda manifest: manifest.update(source=f"owner/name@{COMMIT}"))

    with pytest.raises(CheckpointError, match=f"give --model owner/name@{COMMIT}$"):
        open_bundle(bundle).source()


def test_random_weights_are_made_again_wherever_a_bundle_is(bundle, nobody_s_cache):
    checkpoint = RandomCheckpoint("lfm2-350m")
    edit(bundle, lambda manifest: manifest.update(source=checkpoint.name, source_sha256=checkpoint.digest()))

    assert open_bundle(bundle).source().digest() == checkpoint.digest()


def test_where_one_has_exported_the_checkpoint_is_found_from_any_directory(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert tiny_bundle.manifest.source == "checkpoint"
    assert tiny_bundle.source().place == str(TINY)


def test_a_bundle_does_not_tell_where_its_checkpoint_lies(tiny_bundle):
    traces = (str(TINY).encode(), str(REPO).encode(), str(Path.home()).encode() + b"/")

    for path in tiny_bundle.directory.rglob("*"):
        assert path.is_dir() or not any(trace in path.read_bytes() for trace in traces), path


def test_a_checkpoint_that_has_moved_must_be_given(bundle, tmp_path, nobody_s_cache):
    moved = shutil.copytree(TINY, tmp_path / "moved")
    digest = open_checkpoint(moved).digest()
    edit(bundle, lambda manifest: manifest.update(source_sha256=digest))
    remember(digest, str(tmp_path / "gone"))

    with pytest.raises(CheckpointError, match=r"gone: no such directory.*--model says where"):
        open_bundle(bundle).source()
    assert open_bundle(bundle).source(moved).digest() == digest


def test_another_checkpoint_in_the_recorded_place_is_refused(bundle, nobody_s_cache):
    remember("0" * 64, str(TINY))

    with pytest.raises(BundleError, match="not the checkpoint that"):
        open_bundle(bundle).source()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 3}', "{}"])
def test_a_damaged_record_is_none(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember("1" * 64, "/somewhere")
    assert place_of("1" * 64) == "/somewhere"
    (tmp_path / "lfm-edge/checkpoints" / f"{'1' * 64}.json").write_text(content)

    assert place_of("1" * 64) is None


def test_where_the_cache_cannot_be_written_nothing_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    remember("1" * 64, "/somewhere")

    assert place_of("1" * 64) is None


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub's client with the trained toy checkpoint in it, and no network."""
    in_hub_cache(TINY, tmp_path / "hub", "maker/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "places"))  # what is remembered of it ends with it
    return tmp_path / "hub"


@pytest.mark.parametrize("asked", ["maker/tiny", "maker/tiny@main", f"maker/tiny@{COMMIT}"])
def test_a_model_of_the_hub_is_named_by_its_commit(hub, asked):
    checkpoint = open_checkpoint(asked)

    assert checkpoint.name == checkpoint.place == f"maker/tiny@{COMMIT}"
    assert checkpoint.source == asked
    assert checkpoint.digest() == open_checkpoint(TINY).digest()


def test_the_commit_that_was_exported_is_fetched_again_when_the_hub_has_another(hub, bundle):
    checkpoint = open_checkpoint("maker/tiny")
    edit(bundle, lambda manifest: manifest.update(source=checkpoint.name, source_sha256=checkpoint.digest()))
    remember(checkpoint.digest(), checkpoint.place)
    (hub / "models--maker--tiny/refs/main").write_text("f" * 40)

    assert open_bundle(bundle).source().name == f"maker/tiny@{COMMIT}"


@pytest.mark.parametrize("asked", ["maker/tiny@other", f"maker/tiny@{'e' * 40}"])
def test_a_revision_that_is_not_there_is_one_line(hub, asked):
    with pytest.raises(CheckpointError, match=f"{asked}: cannot be fetched from the hub") as raised:
        open_checkpoint(asked)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("asked", ["maker/tiny@", "maker/tiny@../../x", "@main", "maker@main", "maker/tiny@a b"])
def test_what_is_no_revision_is_refused(hub, asked):
    with pytest.raises(CheckpointError, match="not a hub id"):
        open_checkpoint(asked)


def test_a_cached_checkpoint_is_exported_from_its_folder_of_links(tmp_path):
    snapshot = in_hub_cache(TINY, tmp_path / "hub", "maker/tiny")
    (tmp_path / "bundle").mkdir()

    checkpoint = open_checkpoint(snapshot)
    checkpoint.copy_text_files(tmp_path / "bundle")

    assert checkpoint.digest() == open_checkpoint(TINY).digest()
    assert checkpoint.tensor("model.embed_tokens.weight").shape == (272, checkpoint.config.hidden_size)
    assert not any(path.is_symlink() for path in (tmp_path / "bundle").iterdir())
    assert TextTokenizer(tmp_path / "bundle").template


# --- what may be edited -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
@pytest.mark.parametrize("change", [lambda path: path.write_text("---\nlicense: other\n---\n"), Path.unlink])
def test_a_file_that_no_runtime_reads_may_be_edited(bundle, name, change):
    (bundle / name).write_text("as it was exported")
    Manifest.read(bundle).write(bundle)
    assert open_bundle(bundle).edited == ()

    change(bundle / name)

    assert open_bundle(bundle).edited == (name,)
    shown = lfm_edge("inspect", bundle)
    assert shown.returncode == 0 and "edited since" in shown.stdout and name in shown.stdout


@pytest.mark.parametrize("name", ["sub/README.md", "tasks.json", "config.json", "genai_config.json"])
def test_what_a_client_or_verify_reads_may_not_be_edited(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("as it was exported")
    Manifest.read(bundle).write(bundle)
    (bundle / name).write_text("edited")

    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_bundle(bundle)


def test_what_the_hub_adds_is_no_matter(bundle):
    (bundle / ".gitattributes").write_text("*.pte filter=lfs")
    (bundle / ".cache/huggingface").mkdir(parents=True)

    assert open_bundle(bundle).edited == ()


# --- tokenizers, chat templates, tasks ----------------------------------------------------------------------------


def test_a_tokenizer_that_its_library_panics_over_is_one_line(bundle):
    raw = json.loads((bundle / "tokenizer.json").read_text())
    raw["post_processor"]["special_tokens"] = {}
    (bundle / "tokenizer.json").write_text(json.dumps(raw))

    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that works"):
        TextTokenizer(bundle).encode("hi")


GREEDY_TEMPLATES = {
    "loops in loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "loops over a list": ("{% set l = range(9999)|list %}" + "{% for a in l %}" * 5 + "{% endfor %}" * 5, "seconds"),
    "paragraphs": ("{{ lipsum(n=9999999) }}", "seconds"),
    "text doubled by ~": ("{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
                          "makes too much"),
    "text doubled by +": ("{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
                          "makes too much"),
    "text replaced by itself": ("{% set n = namespace(x='xx') %}{% for a in range(9) %}"
                                "{% set n.x = n.x|replace('x', n.x) %}{% endfor %}", "makes too much"),
    "text repeated": ("{{ 'x' * 9999999999 }}", "makes too much"),
    "a filter that pads": ("{{ 'x'|center(9999999999) }}", "makes too much"),
    "a method that pads": ("{{ 'x'.ljust(9999999999) }}", "makes too much"),
    "a wide format": ("{{ '%9999999999d' % 1 }}", "too wide"),
    "a wide format by a filter": ("{{ '%9999999999d'|format(1) }}", "too wide"),
    "a wide format by a method": ("{{ '{:9999999999}'.format(1) }}", "too wide"),
    "a width from elsewhere": ("{{ '{:{}}'.format(1, 9999999999) }}", "too wide"),
    "a large power": ("{{ 9 ** 99999 ** 9 }}", "too large"),
    "squares": ("{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
                "too large"),
    "a macro in itself": ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
}


@pytest.mark.parametrize("case", GREEDY_TEMPLATES)
def test_a_template_that_takes_too_much_is_stopped(bundle, monkeypatch, case):
    template, complaint = GREEDY_TEMPLATES[case]
    monkeypatch.setattr(sandbox, "SECONDS", 0.5 if complaint == "seconds" else 100)
    (bundle / "chat_template.jinja").write_text(template)

    with pytest.raises(BundleError, match=f"chat template: .*{complaint}"):
        TextTokenizer(bundle).chat([])


def test_a_template_may_do_what_published_ones_do(bundle):
    (bundle / "chat_template.jinja").write_text(
        "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.text = ns.text ~ m.role + ': ' + m.content.split('</think>')[-1]|trim ~ '\\n' %}{% endfor %}"
        "{{ ns.text }}{{ '-' * 3 }}{{ '%02d' % ns.n }}{{ messages|tojson(indent=4)|length > 10 }}{{ 2 ** 3 }}")
    tokenizer = TextTokenizer(bundle)

    said = tokenizer.chat([{"role": "user", "content": "<think>x</think> hi"}, {"role": "assistant", "content": "yes"}])

    assert tokenizer.decode(said) == "user: hi\nassistant: yes\n---02True8"


def test_a_time_limit_leaves_a_debugger_where_it_was(bundle):
    def watch(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        TextTokenizer(bundle).chat([])
        assert sys.gettrace() is watch
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "3", '[{"task": "a", "answer": "b", "messages": 3}]',
                                     '[{"task": "a", "answer": "b", "messages": [{"role": 1, "content": "x"}]}]'])
def test_tasks_that_are_none_are_one_line(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)

    with pytest.raises(BundleError, match=r"tasks\.json: malformed"):
        sample.read_tasks(tmp_path)
