"""The whole way in minutes: `python -m train.demo`."""
