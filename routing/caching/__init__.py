"""Caches of experts replayed over recorded decisions."""
