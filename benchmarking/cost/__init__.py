"""Parts of suite_cost.py: the measured windows and the text of the verdict."""
