"""What is learned from a batch; MAE is the first."""
