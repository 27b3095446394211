"""The trainer file: what it may say, and which of DeepSpeed's keys are honored."""
