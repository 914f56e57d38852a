"""Experts one by one: a map of all of them by any measure."""
