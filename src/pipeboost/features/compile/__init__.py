"""Compile: torch.compile of the repeated blocks, once per image size, and CUDA graphs of the forward they make up."""

from pipeboost.compile.graphs import Graphs, capture_graphs
from pipeboost.compile.model import CompiledModel, compile_model

__all__ = ["CompiledModel", "Graphs", "capture_graphs", "compile_model"]
