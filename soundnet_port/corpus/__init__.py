"""Features of many sound files, written to files."""
