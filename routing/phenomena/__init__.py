"""Massive activations and super experts, each by its published rules, from records."""
