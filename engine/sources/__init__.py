"""Where samples come from: finds the samples of a source in a fixed order (`scan`) and reads their bytes (`read`)."""
