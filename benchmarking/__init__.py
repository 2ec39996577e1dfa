"""Launches workloads as subprocesses, records them, analyzes the records."""
