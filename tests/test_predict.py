"""Memory by part from the manifest, what would bring a bundle under a budget, and the bytes of a step."""

from dataclasses import replace

import pytest

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.presets import PRESETS
from lfm_edge.harness.predict import predict, remedies, stored_bytes
from lfm_edge.harness.roofline import step_bytes
from lfm_edge.quantization.recipe import Scheme
from lfm_edge.targets import RUNTIMES, Footprint
from tests.helpers import manifest_of

MB = 10**6
CONFIG = ModelConfig.from_dict(PRESETS["lfm2.5-1.2b"][0])


def manifest(target="android-q4", config=CONFIG, **options):
    """Of a bundle of lfm2.5-1.2b, without its files."""
    return manifest_of(config, target, **options)


@pytest.mark.parametrize(("target", "artifact", "filled", "measured"), [
    ("android-q4", 854.5, 576, 787), ("android-q8", 1309.4, 576, 1242)])
def test_predictions_are_near_what_was_measured(target, artifact, filled, measured):
    """Artifact and peak as measured at 1.2B (docs/internals/measurements.md); both in MB."""
    predicted = predict(manifest(target), round(artifact * MB), filled).total / MB
    assert predicted == pytest.approx(measured, rel=0.05)


def test_parts_are_counted_from_the_manifest():
    found = predict(manifest(), 850 * MB, 1000)
    assert found.kv_cache == 1000 * 6 * 2 * 8 * 64 * 4  # attention layers, keys and values, heads, width, float32
    assert found.conv_state == 10 * 2 * 2048 * 4
    assert found.embedding == 128 * 65_536  # of the table what a step of 128 tokens brings in
    assert found.weights == 850 * MB - (65536 * 2048 + 65536 * 4)
    assert found.largest == "weights"
    assert found.total == sum(found.parts.values())


def test_a_packed_head_and_packed_groups_count_where_the_runtime_makes_them():
    found = predict(manifest("onnx-q4"), 788 * MB, 0)
    body = 1_170_340_608 - 65536 * 2048
    assert found.weights == pytest.approx(788 * MB + body / 32 * 4, rel=1e-3)
    assert found.embedding == 128 * 65_536


def test_a_runtime_that_keeps_what_it_has_read_has_the_whole_table():
    assert predict(manifest("gguf-q4"), 788 * MB, 0).embedding > 65536 * 2048
    assert predict(manifest(prefill_chunk=4096), 850 * MB, 0).embedding == 65536 * 2048 + 65536 * 4
    small = manifest(config=replace(CONFIG, vocab_size=4096), prefill_chunk=1)  # 8 MB, which sessions do not let go of
    assert predict(small, 850 * MB, 0).embedding == 4096 * 2048 + 4096 * 4


def test_a_program_that_keeps_its_cache_takes_the_whole_context():
    whole = predict(manifest(state="internal"), 850 * MB, 10)
    assert whole.kv_cache == manifest().state.nbytes_of(conv=False)
    assert predict(manifest(), 850 * MB, 10).kv_cache < whole.kv_cache


def test_every_single_remedy_that_suffices_is_named():
    assert remedies(manifest(), 4096, 50 * MB) == ["--context 2048", "--kv-dtype int8", "--head-bits 4"]


def test_a_remedy_that_does_not_suffice_is_not_named():
    assert remedies(manifest(), 4096, 70 * MB) == ["--context 1216", "--kv-dtype int8"]  # a 4-bit head saves 59 MB
    assert remedies(manifest(), 576, 50 * MB) == ["--head-bits 4"]  # 576 positions have 14 MB


def test_remedies_are_combined_where_none_suffices():
    assert remedies(manifest(), 4096, 110 * MB) == ["--head-bits 4 --context 1984", "--kv-dtype int8 --head-bits 4"]


@pytest.mark.parametrize(("target", "in_file"), [("android-q4", 2), ("onnx-q4", 1)])
def test_a_remedy_saves_what_the_prediction_says(target, in_file):
    wide, narrow = manifest(target), manifest(target, head_bits=4)
    tables = [stored_bytes((65536, 2048), one.recipe.head, RUNTIMES[one.runtime].footprint) for one in (wide, narrow)]
    artifact = 850 * MB
    saved = (predict(wide, artifact, 4096).total
             - predict(narrow, artifact - in_file * (tables[0] - tables[1]), 4096).total)
    assert "--head-bits 4" in remedies(wide, 4096, saved - MB)
    assert "--head-bits 4" not in remedies(wide, 4096, saved + MB)


def test_nothing_is_suggested_where_nothing_suffices():
    assert remedies(manifest(), 4096, 700 * MB) == []


def test_what_the_bundle_has_or_the_target_does_not_take_is_not_suggested():
    assert remedies(manifest(kv_dtype="int8", head_bits=4), 4096, 10 * MB) == ["--context 2560"]
    assert remedies(manifest("mlx-q4", compute_dtype="float32"), 4096, 10 * MB) == ["--context 3648", "--head-bits 4"]


@pytest.mark.parametrize(("scheme", "expected"), [(Scheme(4, 32), 4 * 64 // 2 + 2 * 4 * 2),
                                                  (Scheme(8, None), 4 * 64 + 4 * 4)])
def test_stored_bytes_count_integers_and_scales(scheme, expected):
    assert stored_bytes((4, 64), scheme, Footprint(scale_bytes=2)) == expected


def test_a_step_reads_each_weight_once_and_the_filled_cache():
    empty = step_bytes(manifest(), 0)
    body, table = (1_170_340_608 - 65536 * 2048) * (4 + 16 / 32) / 8, 65536 * 2048
    assert empty == pytest.approx(body + table, rel=2e-3)
    assert step_bytes(manifest(), 1000) - empty == 1000 * 6 * 2 * 8 * 64 * 4


def test_of_an_untied_embedding_a_step_reads_one_row():
    untied = manifest(config=replace(CONFIG, tie_embedding=False))
    assert step_bytes(untied, 0) - step_bytes(manifest(), 0) == 2048
