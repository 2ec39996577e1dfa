"""What shall run: the jobs and mixes that there are, flags, plan files, limits, the plan."""
