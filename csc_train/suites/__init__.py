"""Suites: the runs behind a table of results, their costs, and the page that shows them."""
