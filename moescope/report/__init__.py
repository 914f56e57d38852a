"""Reports: every applicable analysis of a run in one file."""
