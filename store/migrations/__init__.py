"""From the schema of an older version to the next: one file a step, each of them frozen once it has landed."""
