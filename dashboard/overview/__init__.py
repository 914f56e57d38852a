"""Parts of the overview: runs, findings, map, effects, provenance."""
