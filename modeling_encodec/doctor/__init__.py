"""Whether this machine computes what it should: the bundled models on every device, beside what is stored here."""
