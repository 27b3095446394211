"""Labels to integer tokens and back. No training here (`train/fit_tokenizer.py`), and no ray."""
