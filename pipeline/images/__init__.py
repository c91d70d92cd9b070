"""One encoded image: its header, whether it decodes, smaller copies, sums of its pixels."""
