"""What a network computes of one sound: activations, pooled features, predictions, rows on a clock."""
