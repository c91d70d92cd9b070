"""The pure part: order, boxes and flips as functions of (fingerprint, seed, epoch, position)."""
