"""Parts of blast_radius.py: what happens after a fault, and what it did to the neighbors."""
