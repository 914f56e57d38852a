"""Recording with many workers on Ray: batches out, shards back, one run in the end."""
