"""Everything that touches a live model: loading, anatomy, corpora and batches, taps and probes."""
