"""Capacity, stragglers and placement of experts on devices."""
