"""Learning from sounds: data sets, evaluation, fine-tuning, training and its data."""
