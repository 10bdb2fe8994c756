"""Where the loop runs, and what the clients of this machine do in a round."""
