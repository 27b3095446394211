"""Asks the catalog: what is missing, what departs from its history, what must be kept, where one sample is."""
