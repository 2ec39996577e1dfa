"""Figures and their uncertainty, computed from plain numbers and records."""
