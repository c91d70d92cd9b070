"""From a recipe to a running job: set-up, launch files, checks."""
