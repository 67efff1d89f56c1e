"""What a method is: settings, places, claims, losses, budgets and the meter."""
