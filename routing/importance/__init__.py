"""Which experts matter, by records alone."""
