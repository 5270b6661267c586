"""One attention over several GPUs: measured, and as the cost model has it for more of them."""
