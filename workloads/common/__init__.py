"""What the workload scripts share: flags, device, engine, data, timing, results, client contract."""
