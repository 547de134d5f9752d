"""Real S3 servers that tests and benchmarks start for themselves."""
