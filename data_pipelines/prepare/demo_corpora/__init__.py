"""What the demo's corpora hold: for each a file with a function that gives its samples, the same every time."""
