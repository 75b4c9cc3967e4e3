"""One folder for each feature; none imports another."""
