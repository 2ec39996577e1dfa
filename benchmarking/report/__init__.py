"""Runs of a results folder -> comparison -> files and pages."""
