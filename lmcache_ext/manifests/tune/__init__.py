"""What a server has seen, held against what it was given: a better size for both."""
