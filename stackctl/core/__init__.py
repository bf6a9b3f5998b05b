"""What everything else stands on: errors, the grammar of expressions, the shape of every entry."""
