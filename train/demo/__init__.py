"""From pictures to a trained, measured and exported model: `python -m train.demo`."""
