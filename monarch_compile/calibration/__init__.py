"""Choosing a form for each site of a model: the search, what it measures, and the plan that it makes."""
