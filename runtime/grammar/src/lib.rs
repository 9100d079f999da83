//! Answers in a form that is asked for: JSON schemas, regular expressions, grammars.
