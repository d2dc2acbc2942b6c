"""From one sound to activations, pooled features, predictions, and rows on a stimulus clock."""
