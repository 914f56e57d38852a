"""Directions, latents and sets of them as edits, and what they do."""
