"""Carries a plan out: setup, launching, sampling, proofs, records and what the console says."""
