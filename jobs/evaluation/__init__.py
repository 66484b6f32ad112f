"""What ``jobs/evaluate.py`` is made of: prompts answered in batches, and scored."""
