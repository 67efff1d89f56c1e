"""What is measured while a model trains, and changes nothing."""
