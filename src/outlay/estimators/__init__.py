"""Fitted heads and models outside the training loop; scikit-learn conventions."""
