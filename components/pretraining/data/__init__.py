"""Which tokens a step trains on: curriculum, order, batches."""
