"""Which GPU has which expert: pure functions from loads to placements, and the files that engines read."""
