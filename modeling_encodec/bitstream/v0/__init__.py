"""Version 0 of `.ecdc`, that of the `encodec` package."""
