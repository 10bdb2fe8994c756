"""Tests on the releases, evidence, verdicts."""
