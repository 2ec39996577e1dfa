"""The run folder: file names, schema, reading and writing."""
