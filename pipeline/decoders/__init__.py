"""Decoders: encoded bytes and boxes in, a batch of pixels out."""
