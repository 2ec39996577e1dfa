"""What the workload scripts share: flags, device, engine, data, results, client contract."""
