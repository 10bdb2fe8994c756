"""From the record to what people read."""
