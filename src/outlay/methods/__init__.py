"""Everything that plugs into a run, one file a method."""
