//! JSON schemas as Lark grammars.

use serde_json::Value;

use crate::GrammarError;

/// A grammar for the values that a schema allows.
pub(crate) fn lark(schema: &Value) -> Result<String, GrammarError> {
    Ok(format!("start: {}\n", crate::lark_json(schema)))
}
