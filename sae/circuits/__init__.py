"""Circuits of attention heads from discrete codes."""
