"""The stages of a call: found at a pipeline's methods, timed, verified, added to, cancelled and overlapped."""

from pipeboost.stages.admission import ADMISSION, AT_ONCE, Admission, AdmissionQueue
from pipeboost.stages.built_in import STAGES, TEXT_ENCODING
from pipeboost.stages.call_record import CallRecord, recorded_by, take_record
from pipeboost.stages.composition import Composition
from pipeboost.stages.instrument import instrument_component, instrumented_components
from pipeboost.stages.report import FinishedCall, Report, component_bytes
from pipeboost.stages.spans import RECORDER, WHOLE_CALL, Progress, Recorder
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism, StageVerificationError
from pipeboost.stages.trajectory import TRAJECTORY, Trajectory, with_trajectory, without_trajectory

__all__ = [
    "ADMISSION",
    "AT_ONCE",
    "RECORDER",
    "STAGES",
    "TEXT_ENCODING",
    "TRAJECTORY",
    "WHOLE_CALL",
    "Admission",
    "AdmissionQueue",
    "CallRecord",
    "Checks",
    "Composition",
    "FailedCheck",
    "FinishedCall",
    "Progress",
    "Recorder",
    "Report",
    "Stage",
    "StageParallelism",
    "StageVerificationError",
    "Trajectory",
    "component_bytes",
    "instrument_component",
    "instrumented_components",
    "recorded_by",
    "take_record",
    "with_trajectory",
    "without_trajectory",
]
