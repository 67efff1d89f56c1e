"""Many runs, judged."""
