"""What is run beside a compilation: the command line, the doctor, timing and tuning."""
