"""Compile: torch.compile of the repeated blocks, one graph per kind of block."""

from pipeboost.features.compile.model import CompiledModel, capture_obstacles, compile_model

__all__ = ["CompiledModel", "capture_obstacles", "compile_model"]
