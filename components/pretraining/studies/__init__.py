"""Experiments on training and their commands; nothing of the product imports them."""
