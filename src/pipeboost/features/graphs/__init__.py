"""CUDA graphs of a transformer's forward: captured once per signature, replayed while nothing else changes."""

from pipeboost.features.graphs.graphs import Graphs, capture_graphs

__all__ = ["Graphs", "capture_graphs"]
