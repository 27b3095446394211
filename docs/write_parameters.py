"""Writes docs/parameters.md: python docs/write_parameters.py."""

from pathlib import Path

from engine.show import parameters

if __name__ == "__main__":
    (Path(__file__).parent / "parameters.md").write_text(parameters.page())
