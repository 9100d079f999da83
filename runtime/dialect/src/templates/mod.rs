//! Templates for models whose checkpoints have none.
//!
//! Each writes what the family's published encoder writes. `fixtures/README.md` lists those encoders, and the tests compare with
//! them. As templates they go through [`sluice_text::ChatTemplate`], so nothing that users write becomes a control token.

use crate::syntax::{self, Syntax};

/// The template of a family, if its checkpoints have none.
pub(crate) fn own(family: &'static Syntax) -> Option<&'static str> {
    let templates = [
        (&syntax::DEEPSEEK_V32, include_str!("deepseek_v32.jinja")),
        (&syntax::DEEPSEEK_V4, include_str!("deepseek_v4.jinja")),
        (&syntax::HARMONY, include_str!("harmony.jinja")),
    ];
    templates.into_iter().find(|(of, _)| of.name == family.name).map(|(_, template)| template)
}
