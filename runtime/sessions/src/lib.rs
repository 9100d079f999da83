//! Saved sequences in a folder: found by the longest match of tokens, bounded by bytes.
