"""The cost model: work, predicted times, and the devices that it knows."""
