"""Tables and the HTML report of an evaluation."""
