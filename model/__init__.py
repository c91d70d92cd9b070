"""Vision transformers and the masked-autoencoder objective."""
