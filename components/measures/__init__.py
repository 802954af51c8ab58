"""How models are judged, for every stage: held-out text, tasks, intervals, positions; and one style of figures."""
