"""The lines of a load test's terminal summary."""

from __future__ import annotations

import argparse

Row = tuple[str, str]


def load_in_words(args: argparse.Namespace) -> str:
    """Return who sends, by the flags: so many clients, or an open loop."""
    if args.rate is None:
        return f"{args.clients} clients"
    return f"open loop, {args.rate:g} requests a second, {args.arrival} arrivals"


def summary_rows(figures: dict, args: argparse.Namespace) -> list[Row]:
    """Return label and text of each figure of a job that was run with the flags ``args``."""
    rows = [
        ("Total requests", f"{figures['total_requests']}"),
        ("Successful / failed",
         f"{figures['successful_requests']} / {figures['failed_requests']}"),
    ]  # fmt: skip
    if figures["total_requests"]:
        rows.append(("Success rate", f"{figures['success_rate_percent']:.1f} %"))
    if figures["successful_requests"]:
        rows += _latency_rows(figures)
    if figures.get("slo_attainment_percent") is not None:
        rows.append((f"Within {args.slo_ms:g} ms",
                     f"{figures['slo_attainment_percent']:.2f} % of all requests"))  # fmt: skip
    rows += [
        ("Queries per second", f"{figures['qps']:.1f}"),
        ("Requests per minute", f"{figures['requests_per_minute']:.0f}"),
    ]
    if args.rate is not None:
        rows += _open_loop_rows(figures)
    rows.append(
        ("Load generator", f"{figures['generator_processes']} processes, "
         f"{figures['generator_cpu_cores']:.2f} cores")
    )  # fmt: skip
    rows += [(f"Failed: {kind}", str(n)) for kind, n in sorted(figures["errors"].items())]
    return rows


def _latency_rows(figures: dict) -> list[Row]:
    def ms(*names: str) -> str:
        return " / ".join(f"{figures[f'{name}_latency_ms']:.1f}" for name in names) + " ms"

    return [
        ("Mean latency", ms("mean")),
        ("Median (P50) latency", ms("median")),
        ("P90 latency", ms("p90")),
        ("P95 / P99 latency", ms("p95", "p99")),
        ("P99.9 / max latency", ms("p99_9", "max")),
    ]


def _open_loop_rows(figures: dict) -> list[Row]:
    rows = [
        ("Offered / achieved rate",
         f"{figures['offered_rate']:.1f} / {figures['achieved_rate']:.1f} requests a second"),
        ("Late sends", f"{figures['late_sends']} ({figures['late_for_connection']} for want of a "
         f"connection, {figures['late_by_generator']} by the generator)"),
    ]  # fmt: skip
    if figures["successful_requests"]:
        rows.append(
            ("P50 / P99 from the actual send",
             f"{figures['p50_service_ms']:.1f} / {figures['p99_service_ms']:.1f} ms")
        )  # fmt: skip
    return rows
