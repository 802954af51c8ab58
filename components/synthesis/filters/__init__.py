"""What of a teacher's answers is kept: rules, consistency, duplicates, overlap, and a count of all that."""
