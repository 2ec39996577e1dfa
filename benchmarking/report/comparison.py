"""What the runs of a results folder say together: a plain dict, and a table of all clients.

`compare()` returns `(comparison, clients)`. Everything that renders takes these two and nothing
else. `comparison` is what comparison.json holds. Null is unknown, never 0.

An estimate is `{"mean", "low", "high", "values", "is_interval"}`: a figure over rounds. `values`
has one a round; `low` and `high` are its 95 % interval where `is_interval` (three rounds or more),
else the lowest and the highest value. `mode` is time-slicing, mps, mig, exclusive or cpu-demo,
`settings` what it was set to in words (`even`, `50/25 %`), `variant` both in one name, as flags
have it: `mps`, `mps:even`, `mps:50/25`.

    schema_version  5
    phases, problems, refusals     rows of phases.jsonl, sentences, rows of refusals.jsonl
    prices          {gpu_price_per_hour, kwh_price}; either may be null, costs are in its currency
    matters_percent                differences within it do not matter
    sections[]      runs on one environment; figures of two sections are never compared
      title, cpu_demo, environment, versions, engines, run_ids
      runs[]        {run_id, created_at, outcome, mode, settings, variant, mix, session, method,
                    gpu_uuid, command, notes, mode_evidence[],
                    co_runs[{co_run, phase, clients, repeat, outcome, reason, window_seconds,
                    warnings, proofs[{client, label, verdict, evidence[]}]}]}
      drift_guarded                whether every mode was measured in rounds of one session
      own_error     {percent, ratio (estimate: one client under time slicing over the same alone),
                    label, rounds, is_over_limit (above 2 %)}; null: not measured
      conclusions[] one for each subject of each mix, at the count with the most modes:
        mix, clients, subject ("whole card" or a job's label), copies of that job,
        figure      work (of the whole card: seconds of alone-work a second, higher is better),
                    slowdown (times as long as alone, lower is better; of copies their mean), of a
                    service median_ms; energy_joules_per_work and tail_ms: intervals, no verdict
        better      "higher" or "lower"
        is_claim    whether the verdict is one; without, `verdict` is null
        modes[]     {variant, mode, settings, estimate or null, reason it has none, is_best,
                    is_tied: not surely worse than the best, percent: of tail_ms which percentile}
        best        variant, or null
        verdict     sure: the best is better than every other one
                    no difference that matters: so says every one that is not surely worse
                    cannot tell: these rounds show no difference; see smallest_shown_percent
                    not enough rounds: `rounds` (1 or 2) of three
                    not measured: `reason`
        rounds      the fewest of the modes
        pairs[]     {one, other, percent, low, high (95 % interval of one over other, in percent),
                    p_value, adjusted_p_value (Holm), verdict, better, smallest_shown_percent: the
                    smallest difference that would be found four times in five}; `other` may be
                    "alone": the same jobs one after another, or the job by itself
        runner_up, runner_up_percent (the best over it), smallest_shown_percent, reason, run_ids
      expectations[]               {source (guide, vendor), rule, mode, subject, expected, found,
                    holds (yes, no, cannot tell)} for this mix on this card; mix, clients
      worst_slowdowns[]            {mix, clients, variant, label, slowdown (estimate), caused_by
                    (label, or null), source (pairs, one neighbor, null), next_to[] labels}, the
                    worst first, one for each mode
      not_measured[]               {mode, reason}
      groups[]      a row for each mode, mix and count of clients:
        mode, settings, variant, mix, clients, outcome, reason, run_ids, gpu_uuids, co_runs,
        baseline_ids, is_unverified, rounds, invalid (why figures against the baseline are void)
        stp         estimate: work delivered, the sum of n_i T_i / L
        stp_alone   what the same jobs deliver one after another, by the same rule (about 1)
        antt, overhead_percent, interference_overhead_percent, mechanism_overhead_percent,
        energy_ratio, joules_per_job, joules_per_work (a second of alone-work), estimates;
        fairness (median and range)
        stp_per_multiprocessor, success_rate_percent, average_duration_seconds,
        total_gpu_time_seconds, throughput_clients
        cost_per_1000_work, energy_cost_per_1000_work      of 1,000 seconds of alone-work
        gpu         means over the rounds of what the card's samples say, in nvidia-smi's words
        client_rows[]              {client, workload, label, statuses, proof, reasons, slowdown
                    (estimate), job_seconds, job_time_ratio (over alone), latency {mean, median,
                    std, min, max, p50, p95, p99}: all rounds' raw values together, tail_percent
                    (the highest percentile that stands), tail_ms (estimate: its mean is that of
                    the raw values together), tail_slowdown {"50", "95", "99"}, p99_ms, median_ms
                    (estimates, as tail_ms), responses, missed, is_closed_loop (p99 is service
                    time), slo {percent, bound_ms}, service, joules_per_job, peak_memory_mib,
                    invalid, checks[] against the guide's ranges}
        checks[]
      ramps[]       {mode, settings, variant, mix, clients[], bounds, breaking_point, fits,
                    saturation_clients, sufficient_clients}; `fits`: the most clients that met the
                    criteria before it broke
      interference[]               of pairs: {mode, settings, variant, mix, latency_jobs, cells[]}
      pair_choices[]               {jobs: [a, b], best, verdict, modes[]} which mode for each pair
      noisy[]       {label, kind, points[{variant, duty, slowdown (estimate)}],
                    break_even[{variant, duty or null, reason}]}: the neighbor's duty from which a
                    slice of one's own (MIG) is better
      same_twice[], alone[] (client rows), left_out[], doubts[]

The table of clients has a row for each client of each co-run: section, run_id, folder, session,
mode, settings, variant, mix, phase (co_run, baseline, share_baseline, null), co_run, clients,
repeat, client, workload, label, job_key, status, reason, outcome (of the co-run), verdict (proof),
window_start_seconds, window_end_seconds, jobs (list of {start_seconds, end_seconds,
duration_seconds, in_window}), latency_ms (list or None), failed_requests, slowdown, stp and antt
(of the whole co-run), is_service, and the card's figures of the co-run as gpu_*.
"""
