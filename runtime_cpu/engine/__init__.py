"""Running a model: the engine, the generations that it has open, and how their steps are computed together."""
