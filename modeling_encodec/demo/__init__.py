"""What `modeling-encodec demo` shows: a table, audio, a page."""
