"""Numbers for Prometheus, in a registry of their own: queue, times by stage, steps, memory, outcomes, restarts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeboost.serving.jobs import Job
from pipeboost.serving.service import Service

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """What one app counts."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "pipeboost_requests", "Requests by what answered them", ["route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "pipeboost_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._jobs = Counter(
            "pipeboost_jobs", "Jobs that have ended, by code", ["kind", "code"], registry=self.registry
        )
        self._waiting = Histogram(
            "pipeboost_job_waiting_seconds",
            "From accepted to started",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._running = Histogram(
            "pipeboost_job_running_seconds", "Of the worker", ["kind"], buckets=_SECONDS, registry=self.registry
        )
        self._stages = Counter("pipeboost_stage_seconds", "Of the worker, by stage", ["stage"], registry=self.registry)
        self._steps = Counter("pipeboost_denoising_steps", "Steps of outputs that were made", registry=self.registry)
        self.registry.register(_Now(service))
        service.on_end.append(self.count_job)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; `route` is a template, so that ids make no series."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def count_job(self, job: Job) -> None:
        """Count a job that has ended."""
        self._jobs.labels(job.kind, job.error.code if job.error else job.state).inc()
        if job.started is not None:
            self._waiting.labels(job.kind).observe(max(0.0, job.started - job.created))
        if (result := job.result) is not None:
            self._running.labels(job.kind).observe(result.seconds)
            self._steps.inc(result.steps * len(result.seeds))
            for stage, seconds in result.stages.items():
                self._stages.labels(stage).inc(seconds)

    def text(self, queued: int) -> bytes:
        """Return all of it in Prometheus' format."""
        depth = GaugeMetricFamily("pipeboost_queue_depth", "Jobs that wait", value=queued)
        registry = CollectorRegistry()
        registry.register(_Fixed(depth))
        return generate_latest(self.registry) + generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, family: GaugeMetricFamily) -> None:
        self._family = family

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield self._family


class _Now(Collector):
    """What is read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        service, worker = self._service, self._service.parts.worker
        yield GaugeMetricFamily("pipeboost_ready", "1 where a job is run at once", value=service.ready)
        yield GaugeMetricFamily("pipeboost_running", "Jobs that the worker has", value=service.runner.job is not None)
        yield GaugeMetricFamily("pipeboost_worker_restarts", "Since the server was started", value=worker.restarts)
        memory = GaugeMetricFamily("pipeboost_worker_memory_bytes", "Of the worker", labels=["kind"])
        for kind, size in dict(worker.memory).items():
            memory.add_metric([kind], size)
        yield memory
