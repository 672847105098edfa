"""Peers: built by their own builders, run by their own runtimes, and the same model as the bundle's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lfm_edge import cli, export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.cached import SEAL
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.sources import remember
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.bench import LeftOut, Settings, bench
from lfm_edge.harness.bench_tables import bench_tables, budget_lines
from lfm_edge.harness.memory import Memory
from lfm_edge.harness.peers import PEERS
from lfm_edge.harness.peers.building import prepare
from lfm_edge.harness.peers.peer import PEER_FILE, Built, differences, scheme_line, traits_of
from lfm_edge.harness.round import FILL, PROMPT, Moment, Plan, Point, Round, run_round
from lfm_edge.quantization.recipe import Scheme, recipe
from lfm_edge.session.generation import generate
from lfm_edge.session.state import APPEND, StateSpec
from runtimes import reference as torch_runtime
from tests.client_helpers import tasks
from tests.helpers import TINY, fill_bundle, lfm_edge, save_checkpoint

LLAMA_CPP, EXPORT_LLM, GENAI, MLX_LM = "llama.cpp", "export_llm", "onnxruntime-genai", "mlx-lm"
TEXT = [1] + [20 + 7 * index % 240 for index in range(50)]


def silent(_):
    """No progress."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The trained toy checkpoint as one would write it who hopes that somebody's loader runs code."""
    directory = shutil.copytree(TINY, tmp_path_factory.mktemp("hostile") / "checkpoint")
    trap = directory / "trap.py"
    trap.write_text(f"open({str(directory / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    for name, extra in (("config.json", {"auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"},
                                         "model_file": "trap.py"}),
                        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}})):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return directory


@pytest.fixture(scope="module")
def bundle(hostile, tiny_bundle):
    """As if it had been exported from that: the weights are the same."""
    digest = open_checkpoint(hostile).digest()
    remember(digest, str(hostile))
    return Bundle(tiny_bundle.directory, replace(tiny_bundle.manifest, source_sha256=digest))


@pytest.fixture(scope="module", params=[GENAI, MLX_LM, LLAMA_CPP])
def built(request, bundle):
    """Each peer's artifact. (MLX computes 16 bits slowly on this machine: it gets a bundle of float32 to match.)"""
    peer = PEERS[request.param]
    if peer.name == MLX_LM:
        options = replace(bundle.manifest.options, compute_dtype="float32")
        bundle = Bundle(bundle.directory, replace(bundle.manifest, target="mlx-q4", runtime="mlx", options=options))
    return prepare(peer, bundle, None, silent)


def session_of(built, threads=1):
    peer = PEERS[built.peer]
    peer.import_runtime()
    return peer.open_session(built, threads if peer.takes_threads else None, 16)


def logits_of(session, forgets=False):
    """Logits after a prefill and after each token of a decode; where it forgets, without the conv state."""
    logits = [session.prefill(TEXT[:30])]
    for token in TEXT[30:]:
        for tensor, value in zip(session.held, session.state, strict=True):
            if forgets and tensor.update != APPEND:
                value.zero_()
        logits.append(session.decode(token))
    return np.array(logits)


def likeness(some, others):
    """The median correlation of two sets of logits."""
    return np.median([np.corrcoef(one, other)[0, 1] for one, other in zip(some, others, strict=True)])


def assert_is_the_model(session, checkpoint):
    """Its logits are the float32 model's but for 4 bits of rounding, which is far from losing a conv state."""
    opened = open_checkpoint(checkpoint)
    reference = torch_runtime.ReferenceSession(opened.config, torch_runtime.float_weights(opened),
                                               StateSpec.of(opened.config, len(TEXT)))
    exact = logits_of(reference)
    assert likeness(logits_of(session), exact) > 0.9
    reference.reset()
    assert likeness(logits_of(reference, forgets=True), exact) < 0.6


def test_no_code_of_a_checkpoint_runs(built, hostile):
    assert not (hostile / "sprung").exists()
    assert not list(built.directory.rglob("*.py"))


def test_it_answers_as_the_model_was_trained_to(built):
    session, tokenizer = session_of(built), built.tokenizer()
    for example in tasks(each=2):
        session.reset()
        answer = generate(session, tokenizer.chat(example["messages"]), max_tokens=32, stop=(7,))
        assert tokenizer.decode(list(answer)) == example["answer"]


def test_prompts_in_parts_and_up_to_the_context_and_sessions_anew_agree(built):
    session = session_of(built)
    whole = session.prefill(TEXT * 5)
    for token in (3, 5):
        last = session.decode(token)
    assert session.position == 5 * len(TEXT) + 2
    session.prefill(TEXT * 14)
    while session.position < session.spec.context:
        session.decode(9)
    session.reset()
    for part in (TEXT, TEXT * 3):
        session.prefill(part)
    assert likeness([session.prefill(TEXT)], [whole]) > 0.999
    assert likeness([session.prefill([3, 5])], [last]) > 0.999


def test_it_goes_to_a_fill_and_back_to_an_earlier_one(built):
    session = session_of(built)
    session.prefill(TEXT)
    for position in (200, 20):
        session.stand_at(position)
        assert session.position == position
        assert np.isfinite(session.decode(3)).all()
        assert session.position == position + 1


def test_a_round_measures_it_as_it_measures_a_bundle(built):
    """In a fresh process, as anywhere else; what comes out is checked, not how fast it was."""
    threads = 1 if PEERS[built.peer].takes_threads else None
    made = run_round(Plan(str(built.directory), threads, (40,), 4, (128,), sustained_s=0.1, chunk=32))
    assert [(point.kind, point.tokens, point.prefill_tokens) for point in made.points] == [
        (PROMPT, 40, 40), (FILL, 128, 32)]
    assert [(moment.after, moment.tokens) for moment in made.moments] == [
        ("load", 0), ("first prefill", 40), ("prefill", 40), ("decode", 44), ("prefill", 124), ("decode", 128),
        ("sustained decode", made.moments[-1].tokens)]
    assert made.load_s > 0 and len(made.sustained_tps) == 1 and made.sustained_tps[0] > 0
    assert made.baseline.resident > 50e6 and made.peak_bytes > 0


def test_what_was_built_is_described_and_found_again(bundle):
    said = []
    first = prepare(PEERS[GENAI], bundle, None, said.append)
    again = prepare(PEERS[GENAI], bundle, "nowhere/at-all", said.append)  # nothing is built, so nothing is read
    assert again == first and "built before" in said[-1]
    assert first.build_s > 0 and first.build_peak_bytes > 100e6  # torch alone takes that
    assert first.artifact_bytes == sum(path.stat().st_size for path in first.artifact.rglob("*"))
    assert {path.name for path in first.directory.iterdir()} == {PEER_FILE, SEAL, "artifact", "tokenizer"}
    assert first.arguments["extra_options"]["block_size"] == "32" and first.versions["onnxruntime-genai"]


def test_what_was_built_and_is_damaged_is_built_again(bundle, tmp_path, monkeypatch):
    def build(peer, scratch, artifact, arguments, place):
        artifact.mkdir()
        (artifact / "weights").write_bytes(b"whole")
        return 1.0, 2

    model = bundle.source().source  # that cache knows where it is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lfm_edge.harness.peers.building._run_builder", build)
    said = []
    built = prepare(PEERS[GENAI], bundle, model, said.append)
    (built.artifact / "weights").write_bytes(bytes(5))
    again = prepare(PEERS[GENAI], bundle, model, said.append)
    assert again == built and (again.artifact / "weights").read_bytes() == b"whole"
    assert any("damaged" in line for line in said)


def test_other_options_are_another_artifact(bundle):
    peer = PEERS[GENAI]
    wide = replace(bundle.manifest, recipe=recipe(4, 64, 4, "int8 rows"))
    options = peer.arguments(wide)["extra_options"]
    assert options["block_size"] == "64" and "matmul_mixed_precision" not in options
    assert peer.arguments(wide) != peer.arguments(bundle.manifest)
    assert peer.arguments(replace(wide, recipe=recipe(8, 32, 8, "int8 rows")))["precision"] == "int8"


def test_differences_are_said_trait_by_trait(bundle):
    ours = traits_of(bundle.manifest)
    assert differences(ours, ours) == []
    theirs = ours | {"head": scheme_line(Scheme(4, 32)), "KV cache": "float16"}
    assert differences(theirs, ours) == ["head: 4 bits in groups of 32, the bundle 8 bits per row",
                                         "KV cache: float16, the bundle float32"]


def test_a_builder_that_fails_ends_in_one_line_and_a_log(bundle, monkeypatch):
    peer = PEERS[GENAI]
    monkeypatch.setattr(type(peer), "arguments", lambda *_: {"precision": "int5", "extra_options": {"hf_token": "no"}})
    with pytest.raises(LfmEdgeError, match=r"its builder failed .*invalid choice: 'int5'") as error:
        prepare(peer, bundle, None, silent)
    assert "usage" in Path(str(error.value).rsplit(" ", 1)[-1]).read_text()


@pytest.fixture
def made_up(monkeypatch, bundle):
    """Peers that are built of nothing, and rounds of no process: 40 MB, and the later the faster to decode."""
    calls = []

    def run_round(plan, limit_bytes=None):
        calls.append(plan)
        points = tuple(Point(PROMPT, length, length, length / 50, plan.generate, plan.generate / len(calls))
                       for length in plan.prompts)
        moment = Moment("decode", max(plan.prompts) + plan.generate, Memory(30_000_000, 10_000_000, 40_000_000))
        return Round(1.0, 2.0, points, (moment,), Memory(0, 0, 0))

    def prepare(peer, bundle, model, progress):
        config = replace(bundle.manifest.config, max_position_embeddings=256)
        arguments = peer.arguments(bundle.manifest)
        directory = bundle.directory.parent / f"{peer.name}-{len(json.dumps(arguments))}"
        return Built(directory, peer.name, arguments, {}, "", config, 5.0, 6_000_000, 7_000_000)

    monkeypatch.setattr("lfm_edge.harness.bench.run_round", run_round)
    monkeypatch.setattr("lfm_edge.harness.bench.prepare", prepare)
    monkeypatch.setattr("lfm_edge.harness.bench.read_bandwidth", lambda threads, cache_bytes: 1e9 * threads)
    return calls


def test_peers_take_turns_with_bundles_and_each_bundle_is_held_against_them(bundle, made_up):
    result = bench([bundle], Settings((8,), 4, threads=(1,), repeat=3, against=(EXPORT_LLM, GENAI, GENAI)))
    assert [plan.directory.rsplit("/", 1)[-1].split("-")[0] for plan in made_up] == 4 * [
        "bundle", "export_llm", "onnxruntime"]
    assert {plan.chunk for plan in made_up[3:]} == {128}
    assert [(entry.bundle, entry.over, entry.what) for entry in result.comparisons] == [
        (str(bundle.directory), peer, what) for peer in (EXPORT_LLM, GENAI) for what in ("prefill", "decode")]
    assert result.comparisons[1].ratio.ratio == 7 / 8  # medians of rounds 4, 7, 10 and 5, 8, 11
    ours, theirs, _ = result.benchmarks
    assert ours.peer is None and ours.predicted is not None
    assert theirs.bundle == EXPORT_LLM and theirs.target is None and theirs.predicted is None
    assert theirs.points[0].limit_tps is None and theirs.points[0].efficiency is None
    assert "rounding: HQQ (its default), the bundle nearest" in theirs.peer.matches[0].differs
    raw = json.loads(json.dumps(result.to_dict()))
    assert raw["benchmarks"][1]["peer"]["build_s"] == 5.0 and raw["benchmarks"][0]["peer"] is None
    assert raw["settings"]["against"] == [EXPORT_LLM, GENAI, GENAI]
    peers = bench_tables(result)[-1]
    assert [str(column.header) for column in peers.columns] == ["", EXPORT_LLM, GENAI]


def test_bundles_of_other_bits_meet_a_peer_of_their_own(bundle, made_up):
    eight = Bundle(bundle.directory.with_name("eight"), replace(bundle.manifest, recipe=recipe(8, 32, 8, "int8 rows")))
    result = bench([bundle, eight], Settings((8,), 4, threads=(1,), repeat=2, against=(GENAI,)))
    names = [f"{GENAI} like bundle", f"{GENAI} like eight"]
    assert [entry.bundle for entry in result.benchmarks[2:]] == names
    ours, theirs = str(bundle.directory), str(eight.directory)
    assert [(entry.bundle, entry.over) for entry in result.comparisons if entry.what == "decode"] == [
        (theirs, ours), (ours, names[0]), (theirs, names[1])]


def test_one_peer_that_matches_one_bundle_is_held_against_all(bundle, made_up):
    wide = Bundle(bundle.directory.with_name("wide"), replace(bundle.manifest, recipe=recipe(4, 128, 8, "int8 rows")))
    ours = str(bundle.directory)
    result = bench([bundle, wide], Settings((8,), 4, threads=(1,), repeat=2, against=(f"{EXPORT_LLM}={ours}",)))
    name = f"{EXPORT_LLM} like bundle"
    peer, = result.benchmarks[2:]
    assert peer.bundle == name and peer.peer.arguments["quantization.group_size"] == "32"
    assert [(entry.bundle, entry.over) for entry in result.comparisons if entry.what == "decode"] == [
        (str(wide.directory), ours), (ours, name), (str(wide.directory), name)]
    first, second = peer.peer.matches
    assert not any("linear layers" in line for line in first.differs)
    assert "linear layers: 4 bits in groups of 32, the bundle 4 bits in groups of 128" in second.differs


def test_peers_need_not_keep_to_the_budget(bundle, made_up, monkeypatch):
    result = bench([bundle], Settings((8,), 4, threads=(1,), repeat=1, budget=39_000_000, against=(GENAI,)))
    assert not result.passed and len(budget_lines(result)) == 1
    ours, theirs = result.benchmarks
    assert not theirs.within_budget
    assert replace(result, benchmarks=(replace(ours, budget_bytes=10**9), theirs)).passed
    ended = (LeftOut(GENAI, None, "too large", 1, 1, peer=True),)
    assert replace(result, benchmarks=(), over_limit=ended).passed


def test_a_peer_of_another_machine_is_neither_built_nor_measured(bundle, made_up, monkeypatch):
    monkeypatch.setattr("lfm_edge.harness.peers.peer.sys.platform", "linux")
    result = bench([bundle], Settings((8,), 4, threads=(1,), repeat=1, against=(MLX_LM,)))
    assert len(result.benchmarks) == 1 and result.comparisons == ()
    left, = result.not_measured
    assert left.bundle == MLX_LM and left.reason.startswith("runs on darwin") and left.artifact_bytes is None
    assert bench_tables(result)[-1].title == "not measured"


@pytest.mark.parametrize("peer", [EXPORT_LLM, GENAI])
def test_biases_that_a_builder_would_drop_are_refused(bundle, peer):
    manifest = replace(bundle.manifest, config=replace(bundle.manifest.config, conv_bias=True))
    with pytest.raises(LfmEdgeError, match=f"--against {peer}: its builder leaves out the biases"):
        PEERS[peer].arguments(manifest)


def test_export_llm_has_no_8_bit_recipe(bundle):
    with pytest.raises(LfmEdgeError, match="it has no 8-bit recipe"):
        PEERS[EXPORT_LLM].arguments(replace(bundle.manifest, recipe=recipe(8, 32, 8, "int8 rows")))


@pytest.mark.parametrize(("options", "message"), [
    (("--against", "torchchat"), "--against torchchat: unknown peer; known are llama.cpp, export_llm, onnxruntime-genai"
                                 ", mlx-lm"),
    (("--against", f"{EXPORT_LLM}=elsewhere"), f"--against {EXPORT_LLM}=elsewhere: elsewhere is none of the bundles"),
    (("--model", "elsewhere"), "--model elsewhere: bench reads a checkpoint for peers only; give --against as well"),
    (("--against", GENAI, "--model", "nowhere"), "nowhere: no such directory"),
    (("--against", GENAI), "was not exported on this machine, which does not know where its checkpoint "
                           "'made by a test' is; give its directory with --model"),
    (("--against", GENAI, "--model", str(TINY)), "not the checkpoint that"),
], ids=str)
def test_what_cannot_be_raced_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    fill_bundle(tmp_path)
    assert message in refused(tmp_path, monkeypatch, capsys, *options)


def test_a_peer_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, capsys):
    fill_bundle(tmp_path)
    monkeypatch.setattr("lfm_edge.harness.peers.peer.importlib.util.find_spec", lambda name: None)
    assert refused(tmp_path, monkeypatch, capsys, "--against", GENAI) == (
        "error: --against onnxruntime-genai: needs the package onnxruntime-genai: pip install 'lfm-edge[peers]'")


def refused(bundle, monkeypatch, capsys, *options):
    """The one line that the command ends with."""
    monkeypatch.setattr("sys.argv", ["lfm-edge", "bench", str(bundle), "--prompt-tokens", "8", "--generate-tokens", "4",
                                     *options])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        cli.main()
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


@pytest.mark.heavy
@pytest.mark.parametrize("peer", [name for name in PEERS if name != LLAMA_CPP])
def test_a_random_model_is_raced_from_end_to_end(tmp_path, peer):
    """The whole command, with the peers that are slow to build: what they build is the same model."""
    checkpoint = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"])
    bundle = export(checkpoint, target="android-q4", output=tmp_path / "q4", context=256)
    if PEERS[peer].is_measured_here:
        ended = lfm_edge("bench", bundle.directory, "--against", peer, "--prompt-tokens", "40", "--generate-tokens",
                         "4", "--fill", "128", "--repeat", "2", "--threads", "1", "--json", tmp_path / "bench.json",
                         timeout=3000)
        assert ended.returncode == 0, ended.stderr
        raw = json.loads((tmp_path / "bench.json").read_text())
        assert {entry["over"] for entry in raw["comparisons"]} == {peer}
    assert_is_the_model(session_of(prepare(PEERS[peer], bundle, None, silent)), checkpoint)
