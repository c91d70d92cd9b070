"""A run from its opening to its end: the loop, guards, roll-backs, saves."""
