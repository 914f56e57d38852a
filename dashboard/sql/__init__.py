"""The SQL page: one SELECT at a time over the open store, within limits of time, rows and bytes."""
