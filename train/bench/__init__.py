"""Peers that the benchmarks of training are measured beside."""
