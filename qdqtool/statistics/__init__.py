"""What was seen of a tensor, mergeable bit for bit, and what follows from it."""
