"""Chat with a trained model as the customer, in a terminal or on a web page."""
