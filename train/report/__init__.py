"""What a run says of itself: metrics, trackers, pictures, status."""
