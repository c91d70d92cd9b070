"""Settings out of defaults, recipe, TOML and command line, and their checks. Imports no torch."""
