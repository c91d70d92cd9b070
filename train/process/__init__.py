"""This process: its place in the world, signals, the watchdog, the lease, the outcome."""
