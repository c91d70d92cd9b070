"""Weights in the names and shapes of other libraries."""
