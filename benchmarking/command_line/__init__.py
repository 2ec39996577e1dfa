"""Arguments, usage errors and numbers as a user reads and writes them."""
