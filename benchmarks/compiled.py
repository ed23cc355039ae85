"""What torch.compile makes of a block for a GPU, on a machine without one: launches, memory traffic, kernels.

`python -m benchmarks.compiled` compiles the block of each size and writes the counts into results/compiled.json, the
budget of tests/benchmarks/test_compiled.py. Autograd traces on the CPU, with tensors without storage. Each graph is
then moved to a GPU that is described but absent, and inductor generates its code. Attention is one opaque operator, as
the flash kernels are. Everything here runs in a process of its own: it replaces functions of torch.cuda.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import sympy
import torch
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor import compile_fx, ir
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.functions import Identity

from benchmarks.harness import RESULTS
from sfd_scale.engines import block_transforms
from sfd_scale.engines.block_transforms import Checkpointing
from sfd_scale.models import attention, fused_backward, layers
from sfd_scale.models.lightningdit import SIZES, Block, LightningDiTConfig
from sfd_scale.models.rope import RotaryEmbedding2D

BUDGET = RESULTS / "compiled.json"
GPU = torch.device("cuda", 0)
BATCH, TOKENS = 32, 256


@dataclass(frozen=True)
class Target:
    """A GPU as the compiler sees it."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def number(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


TARGETS = {"sm_90": Target("NVIDIA H200", (9, 0), 132), "sm_100": Target("NVIDIA B200", (10, 0), 148)}


@dataclass
class Graph:
    """One compiled graph. elementwise_bytes: what its kernels read and write, those of inductor and our own; products
    are not among them.
    """

    backward: bool
    kernels: int
    products: int
    elementwise_bytes: int
    source: str = field(repr=False)


class _Captured(Exception):
    """Ends inductor's work after the code was generated: there is no device to load it on."""


@torch.library.custom_op("sfd_benchmark::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("compiled for a GPU that is not here, and never run")


@torch.library.custom_op("sfd_benchmark::attention_backward", mutates_args=())
def _attention_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("compiled for a GPU that is not here, and never run")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    sums = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


@_attention_backward.register_fake
def _(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))
    return dq, dk, dv


_ATTENTION = torch.ops.sfd_benchmark.attention.default


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


_attention.register_autograd(
    lambda ctx, upstream, _: _attention_backward(upstream, *ctx.saved_tensors), setup_context=_keep
)


@contextlib.contextmanager
def _driver(target: Target) -> Iterator[None]:
    """Triton believes in the target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    active = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target.number, 32), get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda, get_active_torch_device=lambda: GPU,
    )  # fmt: skip
    with mock.patch.object(driver, "_active", active):
        yield


@contextlib.contextmanager
def described(target: Target) -> Iterator[None]:
    """torch.cuda, inductor and triton believe in the target. For code generation only: nothing can run."""
    properties = types.SimpleNamespace(
        name=target.name, major=target.capability[0], minor=target.capability[1], total_memory=140 * 2**30,
        multi_processor_count=target.processors, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152, L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=232448,
    )  # fmt: skip

    def of_properties(device: object = None) -> object:
        return properties

    interface: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": of_properties, "synchronize": lambda device=None: None,
    }  # fmt: skip
    cuda: dict[str, Callable[..., Any]] = {
        **interface,
        "get_device_capability": lambda device=None: target.capability,
        "get_device_name": lambda device=None: target.name,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    more: dict[str, Callable[..., Any]] = {
        "get_compute_capability": lambda device=None: target.number,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
    }
    worker: dict[str, Callable[..., Any]] = {"get_device_properties": of_properties, "current_device": lambda: 0}
    with contextlib.ExitStack() as stack:
        places: tuple[tuple[Any, dict[str, Callable[..., Any]], bool], ...]
        places = ((torch.cuda, cuda, False), (device_interface.CudaInterface, {**interface, **more}, True))
        for place, functions, static in (*places, (device_interface.CudaInterface.Worker, worker, True)):
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(place, name, staticmethod(function) if static else function))
        stack.enter_context(_driver(target))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        DeviceProperties.create.cache_clear()
        yield


def _on_gpu(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move a traced graph to the GPU, in place; returns its inputs there."""
    mode = torch._guards.detect_fake_mode(inputs)
    assert mode is not None
    for node in graph.graph.nodes:
        for name in ("args", "kwargs"):
            moved = map_aggregate(getattr(node, name), lambda a: GPU if isinstance(a, torch.device) else a)
            setattr(node, name, moved)
        node.meta.pop("val", None)
    graph.recompile()
    with torch.no_grad():
        with mode:
            there = [
                torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)
                if isinstance(value, Tensor) else value
                for value in inputs
            ]  # fmt: skip
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*there)
    return there


def _bytes_of_fused(node: BaseSchedulerNode) -> int:
    """Each tensor once, as inductor counts them. Of a tensor that is read in part, inductor counts all."""
    sizes = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    reads: dict[str, list[Any]] = {}
    for dep in node.read_writes.reads:
        reads.setdefault(dep.name, []).append(dep)
    written = {dep.name for dep in node.read_writes.writes}
    only_read = {name: deps for name, deps in reads.items() if name not in written}
    return sum(int(size * (_share(name, only_read[name]) if name in only_read else 1)) for name, size in sizes.items())


def _share(name: str, reads: Sequence[Any]) -> float:
    """The share of a large tensor that is read. The elements of the first rows are listed, and stand for all rows."""
    elements = int(V.graph.get_numel(name))
    ranges = {tuple(map(int, dep.size)) if isinstance(dep, MemoryDep) else () for dep in reads}
    if elements < 2**20 or len(ranges) > 1 or () in ranges:
        return 1.0
    rows, *columns = ranges.pop()
    listed = min(rows, 2**18 // math.prod(columns) + 1)
    grid = np.meshgrid(*(np.arange(size) for size in (listed, *columns)), indexing="ij", sparse=True)
    functions = {"FloorDiv": np.floor_divide, "ModularIndexing": lambda a, step, size: a // step % size}
    touched: set[int] = set()
    for dep in reads:
        expression = dep.index.replace(Identity, lambda value: value)
        index = sympy.lambdify(dep.var_names, expression, modules=[functions, "numpy"])(*grid)
        touched.update(np.unique(index).tolist())
    return min(1.0, len(touched) * rows / listed / elements)


def _bytes_of_own(kernel: ir.UserDefinedTritonKernel) -> int:
    """Each argument once: a kernel of ours reads or writes all of it, and sums that it stores are arguments too."""
    found: dict[str, int] = {}
    for tensor in kernel.inputs:
        assert isinstance(tensor, ir.IRNode)
        size = math.prod(int(n) for n in tensor.get_size())
        found[f"{tensor.get_name()} {tensor.get_layout()}"] = size * tensor.get_dtype().itemsize
    return sum(found.values())


def _backend(target: Target, found: list[Graph]) -> Callable[..., Any]:
    """A backend of torch.compile that generates code for the target, records it, and runs the graph as it was."""

    def record(lowered: GraphLowering) -> None:
        code: Any = lowered.codegen()[0]
        source = str(code.value)
        nodes = lowered.scheduler.nodes
        own = [node.node for node in nodes if isinstance(node.node, ir.UserDefinedTritonKernel)]
        fused = [node for node in nodes if not node.is_extern()]
        found.append(
            Graph(
                backward=lowered.is_backward,
                kernels=len(re.findall(r"^\s+\w+\.run\(.*stream=", source, re.M)),
                products=len(nodes) - len(fused) - len(own),
                elementwise_bytes=sum(map(_bytes_of_fused, fused)) + sum(map(_bytes_of_own, own)),
                source=source,
            )
        )
        raise _Captured

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        as_traced = copy.deepcopy(graph)
        there = _on_gpu(graph, inputs)
        with described(target), mock.patch.object(GraphLowering, "compile_to_module", record):
            try:
                compile_fx.compile_fx_inner(graph, there, **options)
            except Exception as error:  # inductor wraps what is raised inside
                if "_Captured" not in f"{type(error).__name__} {error}":
                    raise

        def run(arguments: list[Any]) -> Any:
            return as_traced(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner, config_patches=options)

    return compiled


def _cast(model: torch.nn.Module, training: bool) -> None:
    """bf16 parameters, without storage; those of norms stay float32, as FSDP2 gives them to forward."""
    kept = {id(param) for param in block_transforms.float32_parameters(model)}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                dtype = torch.float32 if id(param) in kept else torch.bfloat16
                module._parameters[name] = torch.nn.Parameter(torch.empty(param.shape, dtype=dtype), training)


def compile_block(
    size: str, target: Target, checkpointing: Checkpointing = "none", *, training: bool = True, batch: int = BATCH,
    own_kernels: bool = True,
) -> list[Graph]:  # fmt: skip
    """The graphs of one bf16 block of a size: forward, and backward in training. A graph break raises an error."""
    _, width, heads = SIZES[size]
    fused_backward.load()
    found: list[Graph] = []
    settings = torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False)
    with FakeTensorMode(), settings, torch._functorch.config.patch(enable_autograd_cache=False):
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([Block(LightningDiTConfig(size=size))])  # type: ignore[arg-type]
        _cast(model, training)
        rope = RotaryEmbedding2D(width // heads, 16)
        tokens = torch.empty(batch, TOKENS, width, requires_grad=training)
        condition = torch.empty(batch, width, dtype=torch.bfloat16, requires_grad=training)
        compiler = functools.partial(torch.compile, backend=_backend(target, found), fullgraph=True)
        with (
            mock.patch.object(attention, "attend", lambda q, k, v: _attention(q, k, v)[0]),
            mock.patch.object(block_transforms, "KEPT", block_transforms.KEPT | {_ATTENTION}),
            mock.patch.object(layers, "pads_widths", lambda device: True),
            mock.patch.object(layers, "sums_by_sample", lambda device: True),
            mock.patch.object(fused_backward, "sums_by_sample", lambda device: True),
            mock.patch.object(fused_backward, "prepare", lambda shapes, device: None),  # nothing can run
            mock.patch.dict(fused_backward._tried, {(width, heads): own_kernels}),
            _driver(target),  # which arguments a kernel writes is found by a first pass of its compiler
            mock.patch.object(torch, "compile", compiler),
        ):
            with (
                mock.patch.object(torch.cuda, "is_available", lambda: True),
                mock.patch.object(torch.cuda, "current_device", lambda: 0),
            ):
                block_transforms.prepare_blocks(model, checkpointing, compiled=True)
            with torch.set_grad_enabled(training):
                out = model.blocks[0](tokens, condition, rope)
            if training:
                out.sum().backward()
    return found


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in machine code. spilled: bytes of registers that a thread keeps in memory."""

    name: str
    cubin: int
    registers: int
    spilled: int


def kernels(graph: Graph, target: Target) -> Iterator[Kernel]:
    """Compile each Triton kernel of a graph to machine code of the target, by its first configuration."""
    pattern = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)", re.M | re.S)
    with described(target), tempfile.TemporaryDirectory() as folder:
        for name, source in pattern.findall(graph.source):
            path = Path(folder, f"{name[:80]}_{abs(hash(source))}.py")
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            # Our own kernels keep their names in the file, and are numbered in the calls.
            tuner = getattr(module, name, None) or getattr(module, name.rpartition("_")[0])
            with mock.patch.object(
                triton_heuristics.StaticTritonCompileResult, "can_statically_launch", lambda *a: None
            ):
                binary = tuner._precompile_config(tuner.configs[0]).kernel
            registers, spilled = _ptxas(binary.asm["ptx"], Path(folder))
            yield Kernel(name, len(binary.asm["cubin"]), registers, spilled)


def _ptxas(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as the assembler reports them."""
    import triton.backends.nvidia as backend

    assembler = next(Path(backend.__path__[0], "bin").glob("ptxas*"))
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    file = folder / "kernel.ptx"
    file.write_text(ptx, encoding="utf-8")
    command = [str(assembler), "-v", f"--gpu-name={found[1]}", str(file), "-o", str(folder / "kernel.o")]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    return int(registers[1]) if registers else 0, sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def counts(size: str, target: str, checkpointing: Checkpointing, training: bool = True) -> dict[str, int]:
    """The counts of a block that the budget bounds."""
    graphs = compile_block(size, TARGETS[target], checkpointing, training=training)
    sides = {"forward": [g for g in graphs if not g.backward], "backward": [g for g in graphs if g.backward]}
    out: dict[str, int] = {"graphs": len(graphs)}
    for side, own in sides.items():
        out[f"{side} kernels"] = sum(g.kernels for g in own)
        out[f"{side} products"] = sum(g.products for g in own)
    out["elementwise MB"] = round(sum(g.elementwise_bytes for g in graphs) / 1e6)
    return out


def key(size: str, target: str, checkpointing: str, training: bool = True) -> str:
    return f"{size} {target} {f'training {checkpointing}' if training else 'sampling'}"


def _record(name: str, found: dict[str, int]) -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.is_file() else {}
    text = json.dumps({**budget, name: found}, indent=1, sort_keys=True)
    BUDGET.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: B, L, XL, XXL")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: sm_90")
    parser.add_argument("--kernels", action="store_true", help="also compile the kernels of XXL to machine code")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    for target in options.target or ["sm_90"]:
        for size in options.size or ("XXL", "XL", "L", "B"):
            cases: list[tuple[Checkpointing, bool]] = [(mode, True) for mode in get_args(Checkpointing)]
            for checkpointing, training in (*cases, ("none", False)):
                name = key(size, target, checkpointing, training)
                torch.compiler.reset()
                found = counts(size, target, checkpointing, training)
                print(name, found, flush=True)
                if not options.no_write:
                    _record(name, found)
            if options.kernels:
                torch.compiler.reset()
                for graph in compile_block(size, TARGETS[target]):
                    for kernel in kernels(graph, TARGETS[target]):
                        print(f"  {kernel}", flush=True)


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
