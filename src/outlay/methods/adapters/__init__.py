"""Small trainable changes of a frozen model."""
