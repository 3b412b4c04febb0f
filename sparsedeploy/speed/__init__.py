"""Benchmarks of time: candidates, rounds, intervals, comparison."""
