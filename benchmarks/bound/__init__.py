"""Lower bounds of an op's time on a card, from its products, bytes and launches; no GPU is needed."""
