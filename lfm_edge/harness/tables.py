"""Results as tables for a terminal; those of `bench` are in `bench_tables`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import one_line
from lfm_edge.harness.parity import Agreement, Limits
from lfm_edge.harness.sensitivity import Sensitivity, Whole
from lfm_edge.harness.verdict import rounding_line
from lfm_edge.harness.verify import Verification
from lfm_edge.quantization.recipe import NEAREST, MixedBits, Recipe

_LONGEST_VALUE = 10_000  # characters of what a manifest says


def megabytes(count: int) -> str:
    """Bytes in MB (10**6), small sizes in kB (10**3)."""
    return f"{count / 1e6:,.1f} MB" if abs(count) >= 100_000 else f"{count / 1e3:,.1f} kB"


def verification_tables(result: Verification) -> list[Table]:
    """What `verify` shows."""
    parity = _whole("phase", "tokens", "error", "limit", "noise", "KL", "limit", "top-1", "",
                    title=f"{result.target}: artifact against the quantized reference (error and noise of logits in "
                          "standard deviations, KL in nats)", title_justify="left",
                    caption="\n".join([*([result.remark] if result.remark else []),
                                       *(f"{phase}: not run: {reason}" for phase, reason in result.skipped.items())]),
                    caption_justify="left", padding=(0, 1, 0, 0))
    for row, floor in zip(result.parity, result.floor, strict=True):
        parity.add_row(*_agreement(row, result.limits, f"{floor.logit_error:.1e}"))
    parity.add_row("median of all", "", f"{result.typical_error:.1e}", f"{result.limits.typical_error:.1e}",
                   f"{result.typical_floor:.1e}", "", "", "", _verdict(result.typical_passed))
    greedy = result.greedy
    parity.add_row("greedy answer", str(greedy.tokens), "", "", "", "", "", f"{greedy.exact / greedy.tokens:.1%}",
                   f"{f'{greedy.ties} tied, ' * bool(greedy.ties)}{_verdict(greedy.passed)}")
    if result.baked:
        parity.add_row(*_agreement(result.baked, result.limits, ""))
    weights = _whole("weights", "", "")
    found, rounding = result.weights, result.rounding
    weights.add_row("in the artifact", f"{found.blobs} blobs, " + (
        "same bits" if found.passed else f"{len(found.missing)} differ: {found.missing[0]}"), _verdict(found.passed))
    weights.add_row("from the checkpoint", rounding_line(rounding), _verdict(rounding.passed))
    cost = result.quality
    quality = _whole("positions", "perplexity float32", "quantized", "KL (nats)", "limit", "top-1", "",
                     title="quantized reference against the float32 model", title_justify="left")
    quality.add_row(str(cost.positions), f"{cost.float_perplexity:.3f}", f"{cost.perplexity:.3f}",
                    f"{cost.kl_divergence:.4f}", f"{cost.limit:g}", f"{cost.top1_agreement:.1%}",
                    _verdict(cost.passed))
    tables = [parity, weights, quality]
    if result.tasks:
        tasks = _whole("task", "prompts", "float32 model", "artifact", "", title="exact answers", title_justify="left")
        for task in result.tasks:
            tasks.add_row(task.task, str(task.prompts), f"{task.float_accuracy:.1%}", f"{task.accuracy:.1%}",
                          _verdict(task.passed))
        tables.append(tasks)
    return tables


def _whole(*names: str, **options: Any) -> Table:
    """A table that cuts nothing, however narrow the terminal is."""
    return Table(*(Column(name, overflow="fold") for name in names),
                 **{"box": None, "padding": (0, 2, 0, 0)} | options)


def _agreement(row: Agreement, limits: Limits, floor: str) -> tuple[str, ...]:
    """The cells of one phase."""
    limit = limits.of_phase(row.phase)
    return (row.phase, str(row.positions), f"{row.logit_error:.1e}", f"{limit.logit_error:.1e}", floor,
            f"{row.kl_divergence:.1e}", f"{limit.kl_divergence:.1e}", f"{row.top1_agreement:.1%}",
            _verdict(row.within(limits)))


def sensitivity_table(found: Sensitivity, chosen: Whole | None, bits: MixedBits | None) -> Table:
    """What `sensitivity` shows, the dearest first."""
    title = (f"{found.model}: int4 in groups of {found.group_size} in one place, int8 in all others; "
             f"{found.tokens} tokens")
    table = Table("weights", "KL (nats) added", "saves", "KL per MB", *([] if bits is None else ["bits"]),
                  title=title, title_justify="left")
    for cost in sorted(found.costs, key=lambda cost: -cost.per_megabyte):
        choice = [] if bits is None else [str(bits.bits_of(cost.weights[0]))]
        table.add_row(short_names(cost.weights), f"{cost.kl_divergence:.6f}", megabytes(cost.bytes_saved),
                      f"{cost.per_megabyte:.6f}", *choice)
    table.add_section()
    for name, whole in (("all at 8 bits", found.eight_bits), ("all at 4 bits", found.four_bits), ("as chosen", chosen)):
        if whole is not None:
            table.add_row(name, f"{whole.kl_divergence:.6f}", f"takes {megabytes(whole.nbytes)}", "")
    return table


def short_names(weights: tuple[str, ...]) -> str:
    """`layers.3 feed_forward.w1, w3` of the weights' full names."""
    names = [name.removeprefix("model.").removesuffix(".weight") for name in weights]
    stem = names[0].rpartition(".")[0] + "."
    return ", ".join([names[0], *(name.removeprefix(stem) for name in names[1:])])


def bundle_lines(bundle: Bundle) -> list[str]:
    """What `export` ends with: size, context, and what to do next."""
    manifest = bundle.manifest
    head = manifest.recipe.to_dict()["head"]["bits"]
    return [f"  {manifest.decoder.artifact}  {megabytes(bundle.artifact_bytes)}: linear layers "
            f"{manifest.recipe.linear_bits} bits, embedding and head {head}",
            f"  context {manifest.state.context:,}, steps of up to {manifest.options.prefill_chunk:,} tokens; state "
            f"{megabytes(manifest.state.nbytes)}"]


def bundle_table(bundle: Bundle) -> Table:
    """What `inspect` shows."""
    manifest, config = bundle.manifest, bundle.manifest.config
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")  # names of files may be long
    recipe = manifest.recipe.to_dict()
    activations = manifest.options.compute_dtype if recipe["activations"] == "float" else recipe["activations"]
    rows = [
        ("target", f"{manifest.target}: {bundle.target.runs_on}"),
        ("checkpoint", f"{manifest.source} (SHA-256 {manifest.source_sha256[:16]}...), licence: {manifest.licence}"),
        ("model", f"{config.num_parameters / 1e6:,.2f} M parameters, hidden {config.hidden_size}, vocabulary "
                  f"{config.vocab_size}; {len(config.conv_layers)} conv layers of {config.conv_taps} taps, "
                  f"{len(config.attention_layers)} attention layers"),
        ("weights", f"linear layers {_scheme(recipe['body'])}{_exceptions(manifest.recipe)}; "
                    f"embedding and head {_scheme(recipe['head'])}; activations {activations}"),
        ("state", f"{manifest.options.state}, context {manifest.state.context}: "
                  f"KV {megabytes(manifest.state.nbytes_of(conv=False))}, "
                  f"conv {megabytes(manifest.state.nbytes_of(conv=True))}"),
        ("step", f"up to {manifest.options.prefill_chunk} tokens"),
        *([("baked prompt", f"{manifest.baked_prompt.tokens} tokens")] if manifest.baked_prompt else []),
        *(_lowering_rows(manifest.decoder.lowering)),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        *((f"file {name}", megabytes(entry["bytes"])) for name, entry in manifest.files.items()),
        *([("edited since", ", ".join(bundle.edited))] if bundle.edited else []),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{escape(one_line(name))}[/]", escape(one_line(value, _LONGEST_VALUE)))
    return table


def _lowering_rows(lowering: dict) -> list[tuple[str, str]]:
    """What the exporter tells: numbers, and counts by name."""
    return [(key, ", ".join(f"{name} x{count}" for name, count in value.items()) if isinstance(value, dict)
             else str(value)) for key, value in lowering.items()]


def _scheme(entry: dict) -> str:
    group = entry["group_size"]
    return f"int{entry['bits']} " + ("per channel" if group == "channel" else f"in groups of {group}")


def _exceptions(recipe: Recipe) -> str:
    """What else there is to say of the linear layers: those with other bits, and how they were rounded."""
    bits = Counter(scheme.bits for scheme in recipe.mixed.values())
    return "".join(f", {count} of them int{its}" for its, count in bits.items()) + (
        "" if recipe.rounding == NEAREST else f", rounded by {recipe.rounding}")


def _verdict(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[red]FAILED[/]"
