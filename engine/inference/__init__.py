"""Uses a trained model: reads what is given, generates the rest, and draws it."""
