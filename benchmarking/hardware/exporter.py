"""GPU samples for Prometheus, under the names, units and labels of NVIDIA's DCGM exporter.

Dashboards made for that exporter read them as they are. What a card does not tell has no line.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# DCGM's name, the sample's field, what one unit of the field is in DCGM's unit, and the help text.
# Ratios are 0 to 1 there. The energy counter ends in no "_total", so its type is left open.
_FIELDS = (
    ("DCGM_FI_DEV_GPU_UTIL", "utilization_gpu_percent", 1, "GPU utilization (in %)"),
    ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "graphics_engine_active_percent", 0.01,
     "Share of time in which the graphics or compute engine was active"),
    ("DCGM_FI_PROF_SM_ACTIVE", "sm_activity_percent", 0.01,
     "Share of cycles in which a multiprocessor had a warp assigned"),
    ("DCGM_FI_PROF_SM_OCCUPANCY", "sm_occupancy_percent", 0.01,
     "Warps resident on a multiprocessor over the most that it holds"),
    ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "tensor_activity_percent", 0.01,
     "Share of cycles in which a tensor pipe was active"),
    ("DCGM_FI_PROF_DRAM_ACTIVE", "dram_activity_percent", 0.01,
     "Share of cycles in which the memory interface moved data"),
    ("DCGM_FI_DEV_FB_USED", "memory_used_mib", 1, "GPU memory used (in MiB)"),
    ("DCGM_FI_DEV_FB_FREE", "memory_free_mib", 1,
     "GPU memory not used, the driver's reserve included (in MiB)"),
    ("DCGM_FI_DEV_FB_TOTAL", "memory_total_mib", 1, "GPU memory (in MiB)"),
    ("DCGM_FI_DEV_SM_CLOCK", "sm_clock_mhz", 1, "Clock of the multiprocessors (in MHz)"),
    ("DCGM_FI_DEV_GPU_TEMP", "temperature_celsius", 1, "GPU temperature (in C)"),
    ("DCGM_FI_DEV_POWER_USAGE", "power_draw_watts", 1, "Power draw (in W)"),
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "energy_joules", 1000,
     "Energy since the driver was loaded (in mJ)"),
)  # fmt: skip
# Open at once: a scrape takes milliseconds, and who says nothing would keep a thread and a file.
_MAX_CONNECTIONS = 32
_COUNTERS = ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",)


class Exporter:
    """Serves the newest sample over HTTP at ``/metrics``, from a thread of its own."""

    def __init__(self, address: str, port: int, facts: Mapping[str, Any]) -> None:
        """Listen; port 0 takes a free one. ``facts`` are the card's (``nvml.Gpu.describe``).

        Raises:
            OSError: the address cannot be listened on.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        self._labels = _labels(facts)
        self._sample: Mapping[str, Any] = {}
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, address, registry)
        self._connections: deque[socket.socket] = deque()
        # What socketserver asks before it serves a connection, and calls for one that broke.
        server.verify_request = self._make_room  # type: ignore[method-assign]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        host = f"[{address}]" if ":" in address else address
        self.url = f"http://{host}:{server.server_port}/metrics"

    def _make_room(self, request: Any, client_address: object) -> bool:
        """End the oldest connection where there are too many, not the new one: that may be ours."""
        self._connections.append(request)
        if len(self._connections) > _MAX_CONNECTIONS:
            with contextlib.suppress(OSError):  # it has ended already
                self._connections.popleft().shutdown(socket.SHUT_RDWR)
        return True

    def show(self, sample: Mapping[str, Any]) -> None:
        """Serve this sample from now on."""
        used, total = sample["memory_used_mib"], sample["memory_total_mib"]
        free = None if used is None or total is None else total - used
        sample = {**sample, "memory_free_mib": free}
        if sample["utilization_source"] != "nvml":
            sample["utilization_gpu_percent"] = None  # DCGM has none under MIG either
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        """Yield what is known; called by the registry at each request."""
        from prometheus_client.metrics_core import Metric

        for name, field, factor, help_text in _FIELDS:
            value = self._sample.get(field)
            if value is not None:
                metric = Metric(name, help_text, "unknown" if name in _COUNTERS else "gauge")
                metric.add_sample(name, self._labels, factor * value)
                yield metric


def _labels(facts: Mapping[str, Any]) -> dict[str, str]:
    """DCGM's labels; those of a MIG instance only where one is sampled."""
    labels = {
        "gpu": facts["index"],
        "UUID": facts["uuid"],
        "device": None if facts["index"] is None else f"nvidia{facts['index']}",
        "modelName": facts["name"],
        "Hostname": socket.gethostname(),
        "DCGM_FI_DRIVER_VERSION": facts["driver_version"],
    }
    for device in facts["mig_devices"] or ():
        if device["uuid"] == facts["uuid"]:
            labels |= {"GPU_I_PROFILE": device["profile"], "GPU_I_ID": device["gpu_instance_id"]}
    return {name: str(value) for name, value in labels.items() if value is not None}
