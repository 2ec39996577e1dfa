"""What the programs at the top share: modes switched around runs, and what is alike in them."""
