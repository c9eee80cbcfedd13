"""The English model of `make demo-english`, of the tests marked `real`, and of the benchmarks."""
