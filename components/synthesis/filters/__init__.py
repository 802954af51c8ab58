"""What of a teacher's answers is kept: rules, consistency, duplicates, and a count of all that."""
