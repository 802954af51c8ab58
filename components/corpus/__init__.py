"""What the project's text is, for every stage: categories, languages, item templates, overlap, shards, dialogues."""
