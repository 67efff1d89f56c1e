"""Methods that hold weights at zero."""
