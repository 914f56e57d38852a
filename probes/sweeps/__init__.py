"""Many interventions at once: every expert, drop sets, fewer experts a token, strengths."""
