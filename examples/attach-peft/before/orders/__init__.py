"""A federation of shops that teaches a language model which orders they take."""
