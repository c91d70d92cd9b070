"""Engines take a step on a batch; the state of each can be read and set by parameter name."""
