"""rbfast: move reasoning from a strong teacher into an open model."""
