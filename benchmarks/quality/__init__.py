"""What Monarch attention costs in quality: pretrained models on real data, exact, lowered, calibrated, and controls."""
