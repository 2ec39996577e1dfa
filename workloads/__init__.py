"""The jobs: each script stands alone and can be a client of the benchmark suite."""
