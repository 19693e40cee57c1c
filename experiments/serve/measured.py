"""What Prometheus may read of the service."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Measured:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.requests = Counter("tim4rec_requests_total", "Requests answered", ["route", "status"], registry=kept)
        self.seconds = Histogram(
            "tim4rec_request_seconds",
            "Seconds from a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=kept,
        )
        self.batch_rows = Histogram("tim4rec_batch_rows", "Rows answered together", buckets=_ROWS, registry=kept)
        self.batch_seconds = Histogram(
            "tim4rec_batch_seconds", "Seconds of the answers to a batch", buckets=_SECONDS, registry=kept
        )
        self.events = Counter("tim4rec_events_total", "Events taken in", registry=kept)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is asked for its value when it is read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Returns everything in the text format of Prometheus."""
        return generate_latest(self.registry)
