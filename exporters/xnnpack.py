"""Lowering to XNNPACK as `to_edge_transform_and_lower` does it, to the same program, in less time and memory.

What is left out or replaced here has no option, so it is patched while a program is lowered. ExecuTorch's version is
pinned; a test compares what comes out with what its own lowering makes, byte for byte.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from executorch.backends.xnnpack import _passes as xnnpack_passes
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge
from executorch.exir.passes import base_post_op_replace_passes
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.remove_noop_pass import RemoveNoopPass, RemoveToCopyPass
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import ReplaceBrokenOpsWithFunctionalOpsPass
from executorch.exir.passes.replace_sym_size_op_pass import ReplaceSymSizeOpPass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.sym_to_tensor_pass import SymToTensorPass
from executorch.exir.program import _program as exir_program
from executorch.exir.schema import DelegateCall, ExecutionPlan
from torch import Tensor
from torch._C import DispatchKey
from torch.export import ExportedProgram


def lower(program: ExportedProgram, metadata: dict[str, Any], release: Callable[[], None]) -> EdgeProgramManager:
    """Hand to XNNPACK what it takes of a program.

    metadata: constants that the result has as methods
    release: called after each delegate, takes out of memory the weights that were read for it
    """
    partitioner = XnnpackPartitioner()
    preserved, _ = partitioner.ops_to_not_decompose(program)
    # Decomposed once: `to_edge_transform_and_lower` does it three times over. Conversions alone have a dimension order.
    converts = any(node.target == torch.ops.aten.to.dtype for node in program.graph.nodes)
    config = EdgeCompileConfig(preserve_ops=preserved, _check_ir_validity=False, _skip_dim_order=not converts)
    with _few_retraces(), _shape_of_linear_known(), _weights_shared(), _weights_released(release):
        return to_edge(program, constant_methods=metadata, compile_config=config).to_backend(partitioner)


class _EdgePasses(NormalizeTransposePass, ReplaceBrokenOpsWithFunctionalOpsPass, ScalarToTensorPass, SymToTensorPass,
                  RemoveMixedTypeOperators):
    """Five passes of `to_edge`, in their order: each hands what it made of an operator to the next."""


@contextlib.contextmanager
def _few_retraces() -> Iterator[None]:
    """Lower with the passes that have something to do in our graphs, and with one trace for those that can share it.

    Lowering is tracing: every pass runs the graph anew over symbolic shapes. `to_edge` has five passes that look at an
    operator at a time, and XNNPACK runs 17 over each delegate, of which most look for batch norms, upsampling and the
    like. There is no option for either, so both lists are replaced while we lower: the program is the same byte for
    byte (docs/internals/executorch.md).
    """
    def edge_passes(_: EdgeCompileConfig) -> tuple[list, list]:
        before = [ReplaceSymSizeOpPass(), _EdgePasses(), RemoveNoopPass(), RemoveToCopyPass()]
        return before, base_post_op_replace_passes

    class NeededPasses(xnnpack_passes.XNNPACKPassManager):
        def __init__(self, program: ExportedProgram, passes: list | None = None) -> None:
            convolves = any("convolution" in str(node.target) for node in program.graph.nodes)
            super().__init__(program, passes or [xnnpack_passes.XNNPACKRemoveCloneOpsTransform, *(
                [xnnpack_passes.Conv1dUnsqueezePass, xnnpack_passes.ChannelsLastTaggedReshapePass,
                 xnnpack_passes.RemoveRedundantCopyPass] if convolves else [])])

    with (patch.object(xnnpack_preprocess, "XNNPACKPassManager", NeededPasses),
          patch.object(exir_program, "_get_aten_to_edge_passes", edge_passes)):
        yield


@contextlib.contextmanager
def _shape_of_linear_known() -> Iterator[None]:
    """Let a retrace take the shape of a linear layer's result from those of its arguments.

    torch takes it from a decomposition into views and a product, over symbolic shapes: a fifth of a lowering.
    """
    operator, key = torch.ops.aten.linear.default, DispatchKey.CompositeImplicitAutograd
    operator.py_impl(key)(lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])))
    try:
        yield
    finally:
        del operator.py_kernels[key]
        operator._dispatch_cache.clear()


@contextlib.contextmanager
def _weights_shared() -> Iterator[None]:
    """Let the copy of each delegate that XNNPACK works on have the program's own weights: it changes none in place."""
    def copied(program: ExportedProgram, _: Any) -> ExportedProgram:
        weights = [*program.state_dict.values(), *program.constants.values()]
        return copy.deepcopy(program, {id(weight): weight for weight in weights})

    with patch.object(XnnpackBackend, "copy_exported_program_for_preprocess", staticmethod(copied)):
        yield


@contextlib.contextmanager
def _weights_released(release: Callable[[], None]) -> Iterator[None]:
    """Have in memory the weights of one delegate at a time, and what XNNPACK's serializer made of the others."""
    preprocess = XnnpackBackend.preprocess

    def released(*arguments: Any) -> Any:
        result = preprocess(*arguments)
        release()
        return result

    with patch.object(XnnpackBackend, "preprocess", staticmethod(released)):
        yield


_SLICE = torch.library.Library("lfm_edge", "FRAGMENT")
_SLICE.define("slice_copy(Tensor self, int dim, int start, int end, int step) -> Tensor")
_SLICE.define("slice_copy.out(Tensor self, int dim, int start, int end, int step, *, Tensor(a!) out) -> Tensor(a!)")
_SLICE.impl("slice_copy", lambda x, *where: torch.ops.aten.slice_copy.Tensor(x, *where), "CompositeExplicitAutograd")
slice_of_any_length = torch.ops.lfm_edge.slice_copy.default
"""`aten.slice_copy`, from some place before the end to the end, of a dimension that may be shorter than that.

torch asks of such a slice whether the dimension is shorter, takes the answer of the example and holds all sizes to it.
Of this one it asks nothing. In the program it is aten's.
"""


@torch.library.register_fake("lfm_edge::slice_copy", lib=_SLICE)
def _(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return x.new_empty([torch.sym_min(size, -start) if axis == dim else size for axis, size in enumerate(x.shape)])


@contextlib.contextmanager
def emission_mended() -> Iterator[None]:
    """Write what there is no option for into the program."""
    def emit(*arguments: Any) -> Any:
        output = emit_original(*arguments)
        for plan in output.program.execution_plan:
            _make_last_delegate_first(plan)
            _name_slices_as_aten(plan)
        return output

    emit_original = exir_program.emit_program
    with patch.object(exir_program, "emit_program", emit):
        yield


def _make_last_delegate_first(plan: ExecutionPlan) -> None:
    """Let the runtime make the delegate of the head before the others.

    It makes them in the order of their list, and while it packs a delegate, the weights of that are in memory twice.
    The head is the largest of all: packed last, it sets the peak of a load. Calls name delegates by their index, so
    the order is free.
    """
    count = len(plan.delegates)
    plan.delegates.insert(0, plan.delegates.pop()) if count else None
    for call in (instruction.instr_args for chain in plan.chains for instruction in chain.instructions):
        if isinstance(call, DelegateCall):
            call.delegate_index = (call.delegate_index + 1) % count


def _name_slices_as_aten(plan: ExecutionPlan) -> None:
    """Let the runtime find its kernel for `slice_of_any_length`, which takes the same arguments."""
    for operator in plan.operators:
        if operator.name == "lfm_edge::slice_copy":
            operator.name, operator.overload = "aten::slice_copy", "Tensor_out"
