"""One co-run on one card: clients launched and sampled, proved, judged, as records."""
