"""Routing traces of other programs as ordinary runs: one file a format, one table of decisions that all become."""
