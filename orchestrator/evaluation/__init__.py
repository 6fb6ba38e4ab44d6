"""Features to numbers: kNN, linear probe, RankMe, cost, latency."""
