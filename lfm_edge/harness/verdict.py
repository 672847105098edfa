"""What `verify` found, in words: each check in a line, and all of it in five."""

from __future__ import annotations

from collections.abc import Iterator

from lfm_edge.harness.parity import Agreement, Limits
from lfm_edge.harness.rounding import RoundingCheck
from lfm_edge.harness.verify import Verification


def verdict_lines(result: Verification) -> list[str]:
    """PASSED or FAILED, then the few numbers that one acts on, then each check that failed."""
    run = [check for check in verification_checks(result) if check[1] is not None]
    good = sum(passed for _, passed, _ in run)
    weights, worst, cost = result.weights, _worst(result), result.quality
    limit = result.limits.of_phase(worst.phase)
    lines = [
        f"{'PASSED' if result.passed else 'FAILED'}  {result.target}  {good} of {len(run)} checks",
        f"  weights  {weights.blobs - len(weights.missing)} of {weights.blobs} identical to the quantizer's",
        f"  parity   worst error {worst.logit_error:.2g} (limit {limit.logit_error:.2g}), {worst.phase}",
        f"  quality  KL {cost.kl_divergence:.4f} nats from the float32 model (limit {cost.limit:g})"]
    if result.tasks:
        prompts = sum(task.prompts for task in result.tasks)
        right = sum(round(task.accuracy * task.prompts) for task in result.tasks)
        theirs = sum(round(task.float_accuracy * task.prompts) for task in result.tasks)
        lines.append(f"  tasks    {right} of {prompts} answered exactly, by the float32 model {theirs}")
    if result.remark:
        lines.append(f"  note     {result.remark}")
    return lines + [f"  FAILED   {name}: {line}" for name, passed, line in run if not passed]


def verification_checks(result: Verification) -> Iterator[tuple[str, bool | None, str]]:
    """The name of each check, whether it passed, None where it was not run, and how."""
    weights, limits, greedy, cost = result.weights, result.limits, result.greedy, result.quality
    yield "weights", weights.passed, (
        f"{weights.blobs} packed weights have the quantizer's bits" if weights.passed else
        f"{len(weights.missing)} of {weights.blobs} packed weights are not in the artifact: "
        f"{', '.join(weights.missing[:3])}{', ...' * (len(weights.missing) > 3)}")
    yield "rounding", result.rounding.passed, rounding_line(result.rounding)
    for row in result.parity:
        yield f"parity: {row.phase}", row.within(limits), agreement_line(row, limits)
    for phase, reason in result.skipped.items():
        yield f"parity: {phase}", None, reason
    yield "parity: median of all", result.typical_passed, (
        f"median logit error {result.typical_error:.1e} (limit {limits.typical_error:.1e})")
    yield "greedy answer", greedy.passed, (
        f"of {greedy.tokens} tokens {greedy.exact} are the reference's best, {greedy.ties} tied with it")
    if result.baked:
        yield "baked prompt", result.baked_passed, agreement_line(result.baked, limits)
    yield "quality", cost.passed, (f"mean KL {cost.kl_divergence:.4f} nats from the float32 model "
                                   f"(limit {cost.limit:g})")
    for task in result.tasks:
        yield f"task: {task.task}", task.passed, (
            f"{task.accuracy:.1%} of {task.prompts} prompts answered exactly, by the float32 model "
            f"{task.float_accuracy:.1%} (may lose {100 * result.thresholds.task_drop:g} points)")


def agreement_line(row: Agreement, limits: Limits) -> str:
    """How near one phase is."""
    limit = limits.of_phase(row.phase)
    return (f"logit error {row.logit_error:.1e} (limit {limit.logit_error:.1e}), KL {row.kl_divergence:.1e} nats "
            f"(limit {limit.kl_divergence:.1e})")


def rounding_line(rounding: RoundingCheck) -> str:
    """How far the weights are from the checkpoint's, and which are further than rounding explains."""
    if not rounding.passed:
        return (f"{len(rounding.wrong)} of {rounding.weights} weights are not the checkpoint's, rounded: "
                f"{', '.join(rounding.wrong[:3])}{', ...' * (len(rounding.wrong) > 3)}")
    return (f"{rounding.weights} weights are the checkpoint's; the furthest off is {rounding.worst}, by "
            f"{rounding.relative_error:.2%}, {rounding.share:.0%} of what its rounding may err")


def _worst(result: Verification) -> Agreement:
    """The phase that is nearest to its limit, or furthest beyond."""
    return max(result.parity, key=lambda row: (not row.within(result.limits), row.logit_error
                                               / result.limits.of_phase(row.phase).logit_error))
