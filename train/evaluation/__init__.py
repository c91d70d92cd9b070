"""What a saved model is worth: held-out losses, nearest neighbours."""
