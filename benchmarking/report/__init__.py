"""Runs of a results folder -> one table of clients -> comparison -> files and pages."""
