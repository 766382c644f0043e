"""What generated images are worth: quality, memorisation, few-step sampling; one JSON per result."""
