"""What score.py and diagnose.py are made of. Knows nothing of training."""
