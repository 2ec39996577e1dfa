"""Parts of speed_table.py: its jobs, their processes, the card's rates and the table's text."""
