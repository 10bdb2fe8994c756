"""What stands between a client's numbers and the server."""
