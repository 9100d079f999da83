//! Dialects: how families of models write thinking and tool calls.
