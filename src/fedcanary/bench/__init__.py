"""SilentBench: how often the monitor is wrong, how soon it is right, and what other rules would have said."""
