"""Runs and observes a whole generation: where its stages begin and end, and how long each took."""

from pipeboost.stages.report import Report
from pipeboost.stages.watch import WHOLE_CALL, Span, timed, watch, watched_components

__all__ = ["WHOLE_CALL", "Report", "Span", "timed", "watch", "watched_components"]
