"""Results in files: what `bench`, `verify`, `eval` and `sensitivity` wrote with --json, read back, and their checks.

Files are not trusted: whatever is not what the schema says is refused, with its place in the file.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import read_json_object
from lfm_edge.harness import bench, evaluation, sensitivity, verify
from lfm_edge.harness.bench import Benchmark, BenchResult, LeftOut
from lfm_edge.harness.bench_tables import budget_line, megabytes, threads_line, unchecked_line
from lfm_edge.harness.evaluation import Evaluation
from lfm_edge.harness.evaluation_lines import evaluation_checks
from lfm_edge.harness.host import Host
from lfm_edge.harness.parity import DECODE
from lfm_edge.harness.sensitivity import Sensitivity, Whole
from lfm_edge.harness.verdict import verification_checks
from lfm_edge.harness.verify import Verification
from lfm_edge.quantization.recipe import MixedBits

MEMORY_LIMIT, MEASURED = "memory limit", "measured"
_LARGEST_INTEGER = 2**63
# What neither XML nor UTF-8 can hold: control characters, halves of surrogate pairs, the two that are no characters.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Provenance:
    """When and where a result was made, and the command that makes it again."""

    made: str
    command: str
    host: Host
    versions: dict[str, str]


@dataclass(frozen=True)
class FoundSensitivity:
    """A sensitivity, and the choice of bits that was made from it, if any, with what it takes and costs."""

    sensitivity: Sensitivity
    chosen: Whole | None
    bits: MixedBits | None


Result = BenchResult | Verification | Evaluation | FoundSensitivity


@dataclass(frozen=True)
class ResultFile:
    """One result and where it came from."""

    path: Path
    provenance: Provenance
    result: Result

    @property
    def name(self) -> str:
        """The path, as any output can hold it."""
        return _clean(str(self.path))


@dataclass(frozen=True)
class Check:
    """One thing that was held against a limit.

    subject: the bundle; passed: None where it was not run; line: what was found, on one line
    """

    subject: str
    name: str
    passed: bool | None
    line: str


def read_results(paths: Sequence[Path]) -> list[ResultFile]:
    """Read results; of a directory, every `*.json` in it, in order of their names.

    Raises LfmEdgeError where one cannot be read, is damaged, or is something else.
    """
    files = [file for path in paths for file in _files(path)]
    return [_read(path) for path in dict.fromkeys(files)]


def checks(result: Result) -> list[Check]:
    """All that was held against a limit in one result. A sensitivity holds nothing against any."""
    if isinstance(result, BenchResult):
        return [check for entry in entries(result) for check in entry_checks(result, entry)]
    if isinstance(result, Verification):
        return [Check(result.bundle, name, passed, line) for name, passed, line in verification_checks(result)]
    if isinstance(result, Evaluation):
        return [Check(*check) for check in evaluation_checks(result)]
    return []


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.json"))
    if not found:
        raise LfmEdgeError(f"{path}: no *.json in this directory")
    return found


def _read(path: Path) -> ResultFile:
    raw = read_json_object(path, LfmEdgeError)
    schema = raw.get("schema")
    if not isinstance(schema, str) or schema not in _READERS:
        raise LfmEdgeError(f"{path}: no result of bench, verify, eval or sensitivity: its schema is {schema!r:.60}; "
                           f"this lfm-edge knows {', '.join(_READERS)}")
    try:
        return ResultFile(path, decoded(Provenance, raw, ""), _READERS[schema](raw))
    except ValueError as error:
        raise LfmEdgeError(f"{path}: damaged: {error}") from None


def _bench(raw: dict[str, Any]) -> BenchResult:
    limit = raw.get("memory_limit")
    return decoded(BenchResult, {**raw, "limit_kind": limit.get("kind") if isinstance(limit, dict) else ""}, "")


def _verification(raw: dict[str, Any]) -> Verification:
    renamed = {"floor": raw.get("noise_floor"), "baked": raw.get("baked_prompt")}
    result = decoded(Verification, {**raw, **renamed}, "")
    phases = [row.phase for row in result.parity]
    if [row.phase for row in result.floor] != phases:
        raise ValueError("noise_floor: not the phases of parity")
    if not {*phases, *([DECODE] if result.baked else [])} <= result.limits.phases.keys():
        raise ValueError("limits.phases: not the phases of parity")
    return result


def _sensitivity(raw: dict[str, Any]) -> FoundSensitivity:
    found = decoded(Sensitivity, raw, "")
    if raw.get("chosen") is None:
        return FoundSensitivity(found, None, None)
    bits = MixedBits(found.group_size, decoded(int, raw.get("head_bits"), "head_bits"),
                     decoded(dict[str, int], raw.get("linear_bits"), "linear_bits"))
    return FoundSensitivity(found, decoded(Whole, raw["chosen"], "chosen"), bits)


def _evaluation(raw: dict[str, Any]) -> Evaluation:
    result = decoded(Evaluation, raw, "")
    if not result.models:
        raise ValueError("models: there is none")
    return result


_READERS = {bench.SCHEMA: _bench, verify.SCHEMA: _verification, evaluation.SCHEMA: _evaluation,
            sensitivity.SCHEMA: _sensitivity}


def decoded(kind: Any, value: Any, where: str) -> Any:
    """A value of a JSON file as the type `kind`: a dataclass, a number, text, an optional one, or a collection of them.

    Entries that a dataclass does not know are left out. where: the value's place, for errors
    Raises ValueError where it is something else.
    """
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, types.UnionType):
        chosen, = (one for one in inner if one is not type(None))
        return None if value is None else decoded(chosen, value, where)
    if outer in (tuple, list) and isinstance(value, list):
        return outer(decoded(inner[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if outer is dict and isinstance(value, dict):
        return {_key(inner[0], key, where): decoded(inner[1], entry, f"{where}[{key!r:.60}]")
                for key, entry in value.items()}
    if kind is Any:
        return _cleaned(value)
    if kind is str and isinstance(value, str):
        return _clean(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool) and (
            abs(value) < _LARGEST_INTEGER):
        return kind(value)
    if kind is float and isinstance(value, float):
        return value
    raise ValueError(f"{where.lstrip('.')}: {_shown(value)} is not {_NAMES.get(kind, 'a list')}")


_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where.lstrip('.')}: {_shown(value)} is not an object")
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):
        if field.name in value:
            found[field.name] = decoded(hints[field.name], value[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{f'{where}.{field.name}'.lstrip('.')}: is missing")
    return kind(**found)


def _key(kind: type, key: str, where: str) -> Any:
    if kind is int and not re.fullmatch(r"\d{1,9}", key):
        raise ValueError(f"{where.lstrip('.')}: {_shown(key)} is not a whole number")
    return kind(_clean(key))


def _cleaned(value: Any) -> Any:
    """Any JSON value, with all text in it clean."""
    if isinstance(value, dict):
        return {_clean(key): _cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_cleaned(entry) for entry in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if not isinstance(value, dict | list) else "a list or an object"


def entry_checks(result: BenchResult, entry: Benchmark | LeftOut) -> list[Check]:
    """The checks of one bundle with one number of threads in a result of `bench`. A peer has to pass none."""
    if isinstance(entry, LeftOut):
        if entry in result.unchecked:
            return [Check(entry.bundle, MEASURED, False, unchecked_line(result, entry))]
        ended = entry in result.over_limit and not is_peer(entry)
        return [Check(entry.bundle, MEMORY_LIMIT if ended else MEASURED, False if ended else None,
                      entry.reason.removeprefix(f"{entry.bundle}: "))]
    if is_peer(entry):
        return []
    its = "" if entry.threads is None else f", {threads_line(entry.threads)}"
    within = (f"peak memory {megabytes(entry.peak_bytes)}, {megabytes(entry.full_context_bytes)} at the full context, "
              f"budget {megabytes(entry.budget_bytes)}")
    found = [Check(entry.bundle, f"memory budget{its}", entry.within_budget, within if entry.within_budget else
                   budget_line(entry).removeprefix(f"{entry.bundle}: "))]
    if result.limit_kind:
        found.append(Check(entry.bundle, f"{MEMORY_LIMIT}{its}", True, f"lives under the limit by {result.limit_kind}"))
    return found


def is_peer(entry: Benchmark | LeftOut) -> bool:
    """Whether it is what another exporter has built, to compare bundles with."""
    return bool(entry.peer)


def entries(result: BenchResult) -> list[Benchmark | LeftOut]:
    """All that a result of `bench` says something of: measured, ended by the limit, not measured."""
    return [*result.benchmarks, *result.over_limit, *result.not_measured]
