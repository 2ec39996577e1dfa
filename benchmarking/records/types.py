"""What the files of a run hold: every shape once, as a struct.

msgspec reads and checks them, and `schemas/*.schema.json` is generated from them. Times are seconds
on CLOCK_MONOTONIC unless a name says otherwise; null is unknown, never 0. Fields that a reader does
not know are passed over, so that a later version may add some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

SCHEMA_VERSION = 3
# How it is measured; under 1 the window opened with `go`, and only units wholly in it counted.
METHOD = 2

Mode = Literal["exclusive", "time-slicing", "mps", "mig", "cpu-demo"]
# A baseline is one job alone on the whole GPU, a share baseline one alone on its own MIG instance
# or static partition, a null one client where a baseline would find the same (its distance from
# the baseline is the method's own error), a co-run is jobs together.
Phase = Literal["baseline", "share_baseline", "null", "co_run"]
RunOutcome = Literal["running", "complete", "failed", "interrupted", "invalid"]
CoRunStatus = Literal["ok", "failed", "timeout", "interrupted", "invalid"]
ClientStatus = Literal["ok", "failed", "oom", "timeout", "killed", "invalid", "interrupted"]
FailureCause = Literal[
    "out_of_memory", "diverged", "not_finite", "damaged_file", "unreadable_image"
]
Verdict = Literal["verified", "invalid", "unverified", "not_applicable"]

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1)]
# What goes on into a command line or an environment.
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._+-]+$")]


class Evidence(Struct, omit_defaults=True):
    """One thing that was looked at to tell which mode was in force; `ok` null: not to be told."""

    check: str
    found: str | None
    ok: bool | None
    # the command that mends it; only what speaks against the mode has one
    fix: str | None = None

    def __post_init__(self) -> None:
        """Drop the advice where nothing has to be mended."""
        if self.ok is not False:
            self.fix = None


class Proof(Struct):
    """Whether a client ran under the mode that its figures are called by."""

    verdict: Verdict
    evidence: list[Evidence]

    @property
    def reason(self) -> str:
        """The first evidence that spoke against the client, or could not be told."""
        wanted = False if self.verdict == "invalid" else None
        against = [item for item in self.evidence if item.ok is wanted]
        return f"{against[0].check}: {against[0].found}" if against else ""


class Job(Struct, kw_only=True):
    """One whole job of a client; `in_window`: it began after `go` and ended in the window."""

    index: Count = 0
    start_seconds: float
    end_seconds: float
    duration_seconds: Amount
    in_window: bool


class Units(Struct, kw_only=True):
    """The units of one kind in the window; `latency`: a user waits for each of them.

    One across an edge counts by its share inside, in `count` as in `seconds`; requests count where
    they end.
    """

    count: Amount
    seconds: Amount
    latency: bool


class ClientRecord(Struct, kw_only=True, tag="client", tag_field="record"):
    """A line of records.jsonl: what one client did in one co-run."""

    phase: Phase
    co_run: Name
    mode: Mode
    clients: Positive
    repeat: Count
    client: Count
    workload: Name
    label: str
    job_key: Name
    status: ClientStatus
    reason: str | None
    cause: FailureCause | None = None
    # who held what when memory ran out, in MiB
    memory: dict[str, Any] | None = None
    proof: Proof
    window_start_seconds: float | None
    window_end_seconds: float | None
    jobs: list[Job]
    units: dict[str, Units]
    latency_ms: list[Amount] | None
    # by kind: waits that percentiles with the others would hide, such as that for the first token
    apart_latency_ms: dict[str, list[Amount]] | None = None
    figures: dict[str, Any]
    identity: dict[str, Any] | None
    host_cpu_seconds: Amount | None
    window_host_cpu_fraction: Amount | None
    busiest_thread_cpu_fraction: Amount | None
    cpu_wait_fraction: Amount | None = None
    peak_memory_mib: Amount | None
    startup_seconds: Amount | None
    exit_code: int | None
    stderr_tail: list[str]
    slowdown: Amount | None
    normalized_progress: Amount | None
    # null: too little is known of its CPU seconds
    host_limited: bool | None = None


class GpuFigures(Struct, kw_only=True):
    """The card over a co-run's window, in nvidia-smi's words; means but where a name says more."""

    utilization_gpu_percent: Amount | None = None
    utilization_source: str | None = None
    sm_activity_percent: Amount | None = None
    sm_occupancy_percent: Amount | None = None
    tensor_activity_percent: Amount | None = None
    dram_activity_percent: Amount | None = None
    power_draw_watts: Amount | None = None
    sm_clock_mhz: Amount | None = None
    host_cpu_percent: Amount | None = None
    memory_used_mib_max: Amount | None = None
    energy_joules: Amount | None = None
    temperature_celsius_max: float | None = None
    throttle_reasons: list[str] | None = None
    # the part of the window that samples tell of
    coverage_percent: Amount | None = None


class Summary(Struct, kw_only=True):
    """Figures over all clients of a co-run (defined in `metrics/scores.py`).

    Against the baselines that were known at the time: a report takes those of all rounds.
    """

    clients: Count = 0
    throughput_clients: Count = 0
    stp: Amount | None = None
    antt: Amount | None = None
    overhead_percent: float | None = None
    interference_overhead_percent: float | None = None
    fairness: Amount | None = None
    energy_ratio: Amount | None = None
    success_rate_percent: Annotated[float, Meta(ge=0, le=100)] | None = None
    average_duration_seconds: Amount | None = None
    total_gpu_time_seconds: Amount | None = None


class CoRunRecord(Struct, kw_only=True, tag="co_run", tag_field="record"):
    """A line of records.jsonl: clients that ran together, written behind all their lines."""

    phase: Phase
    co_run: Name
    mode: Mode
    clients: Positive
    repeat: Count
    outcome: CoRunStatus
    reason: str | None
    # the counting window; it opens that long after `go`
    settle_seconds: Amount = 0.0
    window_start_seconds: float | None
    window_end_seconds: float | None
    go_skew_ms: Amount | None
    start_skew_ms: Amount | None
    gpu: GpuFigures | None
    warnings: list[str]
    # whether other people's processes used the GPU meanwhile
    is_contended: bool = False
    summary: Summary
    # why the count broke, where it did (measuring/stop_reasons.py)
    stop_reason: dict[str, Any] | None = None


Record = ClientRecord | CoRunRecord


class MpsLimits(Struct, kw_only=True, frozen=True):
    """What MPS clients are limited to, in turn; `partitions`: a static one of their own each."""

    partitions: bool = False
    percentages: tuple[Word, ...] = ()
    memory_limits: tuple[Word, ...] = ()
    priorities: tuple[Word, ...] = ()


class Bounds(Struct, kw_only=True):
    """What breaks a count besides a client that fails."""

    max_slowdown: float | None = None
    max_p99_ms: float | None = None


class Environment(Struct, kw_only=True):
    """What a run was measured on."""

    gpu_name: str | None = None
    gpu_uuid: str | None = None
    gpu_memory_mib: float | None = None
    multiprocessor_count: int | None = None
    # before the first client: part of every co-run's energy
    idle_power_watts: Amount | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    # length of the card's time slice, as nvidia-smi calls it
    timeslice: Annotated[str, Meta(pattern="^[A-Za-z]+$")] | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    host_cores: int | None = None
    os: str | None = None
    # of the project; null: a run of before 2.0.0
    project_version: str | None = None
    # of the checkout that the project is, if it is one
    git_commit: str | None = None
    git_dirty: bool | None = None


class Resumption(Struct, kw_only=True):
    """A run that had been cut off went on; how it had ended before, with its notes of then."""

    resumed_at: str
    ended: RunOutcome | Literal["killed"]
    finished_at: str | None
    notes: list[str]


class Manifest(Struct, kw_only=True):
    """manifest.json: what a run was asked for, on what, and how it ended."""

    schema_version: Literal[3]  # SCHEMA_VERSION
    method: Literal[1, 2] = 1  # METHOD
    # what runs have in common whose repeats are rounds, one next to the other; null: a run by
    # itself, whose comparison with others is not guarded against drift
    session: str | None = None
    run_id: Name
    created_at: str
    command: list[str] = field(default_factory=list)
    mode: Mode
    effective_mode: Mode
    mix: Name
    is_pairs: bool = False
    job_size: str | None = None
    seed: Count = 42
    mps_limits: MpsLimits | None = None
    # profile of each client's instance
    mig_layout: list[Word] | None = None
    # whether other people's processes were on the GPU at the start
    is_contended: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    plan_file: dict[str, Any] | None = None
    plan: dict[str, Any]
    environment: Environment = field(default_factory=Environment)
    mode_evidence: list[Evidence] = field(default_factory=list)
    baseline_run_id: str | None = None
    notes: list[str]
    resumptions: list[Resumption] = field(default_factory=list)
    # what was asked for, for going on with the run after a cut
    request: dict[str, Any] | None = None
    resolved_arguments: dict[str, list[str]] | None = None
    finished_at: str | None = None
    outcome: RunOutcome = "running"


class GpuProcess(Struct, kw_only=True):
    """A process on the card, as NVML lists it."""

    pid: int
    used_memory_mib: Amount | None = None


class Sample(Struct, kw_only=True, tag="sample", tag_field="record"):
    """A line of gpu_samples.jsonl: the GPU at one moment. Null is what the GPU does not offer."""

    time_seconds: float
    wall_time: str | None = None
    gpu_index: int | None = None
    gpu_uuid: str | None = None
    utilization_gpu_percent: Amount | None = None
    utilization_source: str | None = None
    graphics_engine_active_percent: Amount | None = None
    sm_activity_percent: Amount | None = None
    sm_occupancy_percent: Amount | None = None
    tensor_activity_percent: Amount | None = None
    dram_activity_percent: Amount | None = None
    memory_used_mib: Amount | None = None
    memory_total_mib: Amount | None = None
    sm_clock_mhz: Amount | None = None
    power_draw_watts: Amount | None = None
    energy_joules: Amount | None = None
    throttle_reasons: list[str] | None = None
    temperature_celsius: float | None = None
    host_cpu_percent: Amount | None = None
    # processes on the card, only in the samples in which they were asked for
    compute_pids: list[GpuProcess] | None = None
    mps_pids: list[GpuProcess] | None = None


class Monitor(Struct, kw_only=True, tag="monitor", tag_field="record"):
    """The first line of gpu_samples.jsonl, and of each part of it: the sampler is ready."""


class PhaseRecord(Struct, kw_only=True):
    """A line of phases.jsonl: what one phase of run_experiments.sh did; the later of two counts."""

    phase: Positive
    name: Name
    status: Literal["ok", "failed", "skipped"]
    # why it failed or was skipped; of one that went well, what is to be known of it
    reason: str = ""
    # the run of the phase, a folder beside this file; empty where there is none
    run_folder: str = ""
    seconds: Amount = 0


class Refusal(Struct, kw_only=True):
    """A line of refusals.jsonl: a command that was refused before there was a run, and why."""

    created_at: Name
    command: list[str]
    exit_code: Positive
    sentence: Name
