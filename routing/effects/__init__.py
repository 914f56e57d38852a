"""Analyses of effects: what interventions did, with their controls."""
