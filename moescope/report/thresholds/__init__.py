"""Thresholds: rules that people write in YAML, judged against runs."""
