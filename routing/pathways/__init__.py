"""Routing across layers: transitions, paths, and what predicts the next decision."""
