"""Everything that touches DuckDB: the file, its tables, the writer and the readers."""
