"""Sections of the page on what is right: parity, quality, the scores of tasks, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lfm_edge.harness.bench_tables import megabytes
from lfm_edge.harness.evaluation import Change, Evaluation
from lfm_edge.harness.evaluation_lines import with_error
from lfm_edge.harness.parity import DECODE
from lfm_edge.harness.tables import short_names
from lfm_edge.harness.verdict import rounding_line
from lfm_edge.harness.verify import Verification
from lfm_edge.report import charts
from lfm_edge.report.cells import DASH, Cell, Figure, Files, Names, Section, Table, commands, failed, none, ok, verdict
from lfm_edge.report.charts import Bar, Dot, Value
from lfm_edge.report.results import FoundSensitivity

_MOST_BARS = 40  # of a sensitivity; the table has all


def parity(files: Files, names: Names) -> Section:
    """The artifact against the quantized reference."""
    made = charts.pairs([(names.bundle(result.bundle), _errors(result, names)) for _, result in files],
                        title="parity", x_title="logit error")
    key = Markup('<ul class="legend"><li>{}error</li><li>{}the model\u2019s noise</li><li>{}limit</li></ul>').format(
        charts.key("mark", charts.shape(0)), charts.key("floor", "M0-6V6"), charts.key("limit solid", "M0-7V7"))
    about = ("The largest |artifact \u2212 reference| of a phase, in standard deviations of the reference\u2019s "
             "logits. An error of the size of the noise is one that another correct implementation would have.")
    blocks: list[Table | Figure] = [Figure("Error, noise floor and limit", [*made, key], about)]
    blocks += [_phases(result, names) for _, result in files]
    return Section("parity", "Parity",
                   "The artifact against the quantized reference: the same integers in float32 torch, led through the "
                   "same calls.", blocks, commands(files))


def _errors(result: Verification, names: Names) -> list[Dot]:
    index, limits = names.index(result.bundle), result.limits
    rows = [Dot(row.phase, Value.alone(row.logit_error), f"{row.logit_error:.1e}", index,
                limits.of_phase(row.phase).logit_error, floor.logit_error, not row.within(limits))
            for row, floor in zip(result.parity, result.floor, strict=True)]
    return [*rows, Dot("median of all", Value.alone(result.typical_error), f"{result.typical_error:.1e}", index,
                       limits.typical_error, result.typical_floor, not result.typical_passed)]


def _phases(result: Verification, names: Names) -> Table:
    limits, greedy, weights, rounding = result.limits, result.greedy, result.weights, result.rounding
    agreements = [(row, limits.of_phase(row.phase), f"{floor.logit_error:.1e}")
                  for row, floor in zip(result.parity, result.floor, strict=True)]
    agreements += [(result.baked, limits.of_phase(DECODE), "")] if result.baked else []
    rows: list[Sequence[Cell]] = [
        (row.phase, str(row.positions), f"{row.logit_error:.1e}", f"{limit.logit_error:.1e}", floor,
         f"{row.kl_divergence:.1e}", f"{limit.kl_divergence:.1e}", f"{row.cosine:.6f}", f"{row.top1_agreement:.1%}",
         verdict(row.within(limits))) for row, limit, floor in agreements]
    rows += [(phase, *[""] * 8, none(f"not run: {reason}")) for phase, reason in result.skipped.items()]
    differ = f"FAILED: {len(weights.missing)} differ: {', '.join(weights.missing[:3])}"
    rows += [
        ("median of all", "", f"{result.typical_error:.1e}", f"{limits.typical_error:.1e}",
         f"{result.typical_floor:.1e}", "", "", "", "", verdict(result.typical_passed)),
        ("greedy answer", str(greedy.tokens), "", "", "", "", "", "",
         f"{greedy.exact} exact, {greedy.ties} tied", verdict(greedy.passed)),
        ("weights, bit for bit", str(weights.blobs), *[""] * 7, ok("same bits") if weights.passed else failed(differ)),
        ("weights, against the checkpoint", str(rounding.weights), *[""] * 7,
         (ok if rounding.passed else failed)(rounding_line(rounding)))]
    heading = Markup("<b>{}</b>, {}{}").format(names.bundle(result.bundle), result.target,
                                               f": {result.remark}" if result.remark else "")
    return Table(("phase", "positions", "logit error", "limit", "noise floor", "KL, nats", "limit", "cosine", "top-1",
                  ""), rows, caption=heading, text=frozenset({9}))


def quality(files: Files, names: Names) -> Section:
    """What quantization costs."""
    rows = [(names.bundle(result.bundle), str(result.quality.positions), f"{result.quality.float_perplexity:,.3f}",
             f"{result.quality.perplexity:,.3f}", f"{result.quality.kl_divergence:.4f}",
             f"{result.quality.limit:g}", f"{result.quality.top1_agreement:.1%}",
             verdict(result.quality.passed)) for _, result in files]
    blocks: list[Table | Figure] = [Table(
        ("bundle", "positions", "perplexity, float32", "perplexity, quantized", "KL, nats", "limit", "top-1", ""),
        rows, text=frozenset({7}))]
    tasks = [(names.bundle(result.bundle), task.task, str(task.prompts), f"{task.float_accuracy:.1%}",
              Markup("{} {}").format(f"{task.accuracy:.1%}", charts.meter(task.accuracy, over=not task.passed)),
              verdict(task.passed)) for _, result in files for task in result.tasks]
    if tasks:
        blocks.append(Table(("bundle", "task", "prompts", "float32 model", "artifact", ""), tasks,
                            caption="Prompts with one right answer, answered exactly by greedy decoding.",
                            text=frozenset({1, 5})))
    return Section("quality", "Quality", "What quantization itself costs: the quantized reference against the float32 "
                                         "model on the same text.", blocks, commands(files))


def evaluation(files: Files, names: Names) -> Section:
    """The scores of tasks, by lm-evaluation-harness."""
    blocks = [_scores(result, names) for _, result in files]
    return Section("evaluation", "Tasks of lm-evaluation-harness",
                   "Scores of each model, and how they differ from the first one's. After \u00b1 stands the standard "
                   "error; that of a change comes from the documents, which all models answered.", blocks,
                   commands(files))


def _scores(result: Evaluation, names: Names) -> Table:
    rows = [(f"{score.task}, {score.metric}", f"{names.bundle(model.model)}, {model.computed}",
             f"{score.documents:,}", with_error(f"{score.value:.3f}", score.stderr),
             *_of_change(change, result.settings.max_drop)) for model, score, change in result.rows()]
    return Table(("metric", "model", "documents", "score", "change", "better", "worse", ""), rows,
                 caption="Through the chat template." if result.models[0].templated else "Without a chat template.",
                 text=frozenset({1, 7}))


def _of_change(change: Change | None, limit: float | None) -> tuple[Cell, ...]:
    if change is None:
        return "", "", "", ""
    counts = (DASH if count is None else str(count) for count in (change.better, change.worse))
    return (with_error(f"{change.change:+.3f}", change.stderr), *counts,
            "" if limit is None else verdict(change.within(limit)))


def sensitivity(files: Files, names: Names) -> Section:
    """What 4 bits cost in each part alone."""
    blocks = [block for _, found in files for block in _sensitivity(found)]
    return Section("sensitivity", "Sensitivity",
                   "Each part of the model at 4 bits alone, all others at 8: how far the answers move from those of "
                   "the float32 model.", blocks, commands(files))


def _sensitivity(found: FoundSensitivity) -> list[Table | Figure]:
    base, bits = found.sensitivity, found.bits
    parts = [(short_names(cost.weights) if cost.weights else DASH, cost,
              bits.linear_bits.get(cost.weights[0], bits.head_bits) if bits and cost.weights else None)
             for cost in sorted(base.costs, key=lambda cost: -cost.kl_divergence)]
    rows = [Bar(name, [cost.kl_divergence], f"saves {megabytes(cost.bytes_saved)}{f', {its} bits' if its else ''}",
                1 if its == 8 else 0) for name, cost, its in parts[:_MOST_BARS]]
    key = charts.legend([("4 bits in the choice", 0), ("8 bits in the choice", 1)]) if bits else Markup("")
    shown = f", the dearest {_MOST_BARS} of {len(parts)} parts" if len(parts) > _MOST_BARS else ""
    wholes = (("all at 8 bits", base.eight_bits), ("all at 4 bits", base.four_bits), ("as chosen", found.chosen))
    return [
        Figure(f"What 4 bits cost in one place{shown}",
               [charts.bars(rows, title="Sensitivity", x_title="KL divergence added, nats"), key],
               f"{base.model}, {base.tokens:,} tokens, groups of {base.group_size}"),
        Table(("weights", "take", "KL, nats"), [(name, megabytes(whole.nbytes), f"{whole.kl_divergence:.6f}")
                                                for name, whole in wholes if whole]),
        Table(("weights", "KL added, nats", "saves", "bits chosen"), [
            (name, f"{cost.kl_divergence:.6f}", megabytes(cost.bytes_saved), str(its) if its else DASH)
            for name, cost, its in parts], folded="Every part")]
