"""Recorded vectors as what a trainer reads."""
