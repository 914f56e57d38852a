"""Kinds of edits, as data."""
