"""The codec and its language model: files that travel to the Hub with their checkpoints, and what looks at weights."""
