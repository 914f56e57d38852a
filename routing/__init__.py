"""Analyses of records: one file an analysis, found by the registry. No torch, no model."""
