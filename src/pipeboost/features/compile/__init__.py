"""Compile: torch.compile of the repeated blocks, once per image size, and CUDA graphs of the forward they make up."""

from pipeboost.features.compile.model import CompiledModel, capture_obstacles, compile_model
from pipeboost.features.graphs.graphs import Graphs, capture_graphs

__all__ = ["CompiledModel", "Graphs", "capture_graphs", "capture_obstacles", "compile_model"]
