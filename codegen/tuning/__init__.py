"""The search for schedules, what it found, and what the compiler reports of a kernel."""
