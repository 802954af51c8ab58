"""SmallThinker in PyTorch: configuration, attention, router, experts, losses and checkpoint mapping."""
