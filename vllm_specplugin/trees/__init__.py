"""Draft trees: one tree, the trees of a batch, and the rows of a step."""
