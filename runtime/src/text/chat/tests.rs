//! Tests of templates against Hugging Face's, and of the promise about control tokens.
