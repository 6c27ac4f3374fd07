"""`nydusd doctor`: what this machine can do."""
