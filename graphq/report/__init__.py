"""Terminal tables and what they show."""
