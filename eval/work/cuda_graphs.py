"""Forward passes replayed from CUDA graphs: one launch in place of about a thousand.

N batch · C channels · H, W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfd_scale.diffusion.guidance import FlowModel, FlowOutput

WARMUP = 3  # as in PyTorch's documentation of CUDA graphs


def check_graphs(device: torch.device) -> None:
    """Raises ValueError on a device without CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs: true needs a CUDA device, this one is {device.type}; allowed here: false")


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: FlowOutput


class GraphedModel:
    """A model whose forward passes are captured at the first batch of each of the given `sizes`, then replayed.

    Batches of other sizes run without graphs; solvers with steps per sample have such batches. Only the size decides
    which passes are replayed, so an image is the same on every rank.
    """

    def __init__(self, model: FlowModel, sizes: Iterable[int]) -> None:
        self.model, self.sizes = model, frozenset(sizes)
        self._graphs: dict[int, _Graph] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, t_texture: Tensor, t_semantic: Tensor, y: Tensor, /) -> FlowOutput:
        """(N, C, H, W), times and labels (N,) → the model's output, without the alignment projection."""
        inputs = (x, t_texture, t_semantic, y)
        if len(x) not in self.sizes:
            return _velocities(self.model(*inputs))
        if len(x) not in self._graphs:
            self._graphs[len(x)] = self._capture(inputs)
        captured = self._graphs[len(x)]
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given)
        captured.graph.replay()
        return _map(captured.output, Tensor.clone)

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph:
        own = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.model(*own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread decodes and extracts features meanwhile. Its calls must not invalidate the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = _velocities(self.model(*own))
        return _Graph(graph, own, output)


def _velocities(output: FlowOutput) -> FlowOutput:
    return (output[0], None, output[2]) if len(output) == 3 else (output[0], None)


def _map(output: FlowOutput, each: Callable[[Tensor], Tensor]) -> FlowOutput:
    return (each(output[0]), None, each(output[2])) if len(output) == 3 else (each(output[0]), None)
