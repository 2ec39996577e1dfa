"""From recorded runs to a comparison, a decision and the report that people read."""
