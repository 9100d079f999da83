//! Templates for models whose checkpoints have none.

use crate::syntax::Syntax;

/// The template of a family, if its checkpoints come without one.
pub(crate) fn own(_syntax: &'static Syntax) -> Option<&'static str> {
    None
}
