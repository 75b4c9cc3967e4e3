"""Compile: torch.compile of the repeated blocks, once per image size, and off again without a trace."""

from pipeboost.compile.model import CompiledModel, compile_model

__all__ = ["CompiledModel", "compile_model"]
