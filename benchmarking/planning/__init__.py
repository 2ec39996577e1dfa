"""What is to run: the plan, the plan file, pairs, ramps and the baselines to compare with."""
