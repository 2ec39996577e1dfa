"""What the GPU and the host report: NVML, samples, processor time and limits."""
