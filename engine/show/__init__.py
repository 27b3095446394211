"""Draws what people look at: tables, pictures of labels and tokens, contact sheets, and the report."""
