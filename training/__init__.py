"""What train.py and model_card.py are made of. May use evaluation/, never the reverse."""
