"""fedcanary on Flower: its own study as Flower apps. Needs the extra `flower`."""
