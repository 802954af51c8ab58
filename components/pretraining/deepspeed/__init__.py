"""All that knows DeepSpeed: engine, experts spread over ranks, master weights, dropped steps."""
