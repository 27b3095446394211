"""Turns sources into samples and parts: reads, filters and hashes every sample once, and commits its part."""
