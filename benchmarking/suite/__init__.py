"""A whole run: set up, checked and shown, carried out or gone on with, written down."""
