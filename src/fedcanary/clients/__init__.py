"""The clients: their data, who has which of it, who takes part."""
