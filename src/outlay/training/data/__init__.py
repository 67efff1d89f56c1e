"""From files to padded batches: rows, columns, splits, labels, tokens, pools."""
