"""Models with a loss on top of the encoder; MAE is the first."""
