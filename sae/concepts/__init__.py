"""Concepts: sparse probes, and descriptions in words."""
