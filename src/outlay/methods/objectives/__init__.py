"""What is learned from the data that is seen: weights, terms and targets of the loss."""
