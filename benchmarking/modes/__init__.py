"""The sharing modes and the evidence that one is in force."""
