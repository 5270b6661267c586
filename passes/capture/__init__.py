"""A graph from Dynamo to a pre-dispatch ATen graph, the bodies of higher-order operators included."""
