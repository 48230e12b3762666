"""Cost of a run before it starts: memory, time, and settings that fit (`mergeopd plan`)."""
