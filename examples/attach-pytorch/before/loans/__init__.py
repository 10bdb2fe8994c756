"""A federation of lenders that learns which requests are granted."""
