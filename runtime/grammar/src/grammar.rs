//! What a text must look like: asked for, checked and compiled.

use std::fmt;
use std::sync::Arc;
use std::thread;

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use serde_json::Value;
use sluice_generate::Constraint;

use crate::constraint::{Behind, Matching};
use crate::error::clip;
use crate::{GrammarError, Vocabulary, lark, schema};

/// Longest regular expression that a caller may bring, in bytes.
const MAX_REGEX_BYTES: usize = 32 << 10;

/// Stack for compiling a grammar, in bytes: the library calls itself for each rule that refers to another. Only what is used of it
/// takes memory.
const STACK_BYTES: usize = 256 << 20;

/// What a text must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that is valid by this schema.
    JsonSchema(Value),
    /// All of the text matches this regular expression, in the syntax of Rust's `regex`, without anchors and assertions.
    Regex(String),
    /// A context-free grammar in the library's variant of Lark, with `start` as its first rule. `<|name|>` is a special token, and
    /// `%json {…}` a value by a schema.
    Lark(String),
    /// Exactly this text. Special tokens that are spelled in it are these tokens.
    Text(String),
}

/// A form, checked and compiled for a vocabulary. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    vocabulary: Vocabulary,
    /// At the beginning of the text. Each constraint has a copy.
    matcher: Arc<Matcher>,
    behind: Option<Arc<Behind>>,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("vocabulary", &self.vocabulary)
            .field("behind", &self.behind)
            .finish_non_exhaustive()
    }
}

impl Grammar {
    /// Checks a form and compiles it.
    ///
    /// What cannot be enforced is refused. A schema's references stay inside the schema: nothing is fetched.
    ///
    /// # Errors
    /// When the form is malformed, too large, allows nothing, or asks for something that is not supported.
    pub fn compile(vocabulary: &Vocabulary, form: &Form) -> Result<Grammar, GrammarError> {
        let (text, what) = match form {
            Form::JsonObject => (schema::lark(&serde_json::json!({"type": "object"}))?, "schema"),
            Form::JsonSchema(schema) => (schema::lark(schema)?, "schema"),
            Form::Regex(regex) => (of_regex(regex)?, "regular expression"),
            Form::Lark(text) => (with_schemas(text)?, "grammar"),
            Form::Text(text) => (format!("start: {}\n", vocabulary.lark_text(text)), "text"),
        };
        let matcher =
            compile(vocabulary, text).map_err(|reason| GrammarError::Invalid { what, reason: clip(&reason) })?;
        Ok(Grammar { vocabulary: vocabulary.clone(), matcher: Arc::new(matcher), behind: None })
    }

    /// A constraint at the beginning of its text.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(Matching::new(self.vocabulary.clone(), self.matcher.deep_clone(), self.behind.clone()))
    }

    /// The same behind free text: everything but an end token is allowed until the model has written `marker` (such as
    /// `</think>`), then white space, then the grammar. For models that think before they answer.
    pub fn behind(self, marker: &str) -> Grammar {
        let behind = Some(Arc::new(Behind::new(&self.vocabulary, marker)));
        Grammar { behind, ..self }
    }
}

fn of_regex(regex: &str) -> Result<String, GrammarError> {
    if regex.len() > MAX_REGEX_BYTES {
        let what = format!("a regular expression of {} bytes", regex.len());
        return Err(GrammarError::TooLarge { what, limit: MAX_REGEX_BYTES });
    }
    match regex.is_empty() {
        true => Ok("start: \"\"\n".to_owned()),
        false => Ok(format!("start: /{}/\n", llguidance::regex_to_lark(regex, ""))),
    }
}

/// A caller's grammar with its schemas compiled.
fn with_schemas(text: &str) -> Result<String, GrammarError> {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (range, value) in lark::scan(text)? {
        out.push_str(&text[done..range.start]);
        out.push_str("%lark {\n");
        out.push_str(&schema::lark(&value)?);
        out.push('}');
        done = range.end;
    }
    out.push_str(&text[done..]);
    Ok(out)
}

/// Compiles a grammar, with a stack of its own.
fn compile(vocabulary: &Vocabulary, text: String) -> Result<Matcher, String> {
    let work = || {
        let parser = vocabulary.factory().create_parser(TopLevelGrammar::from_lark(text)).map_err(|e| e.to_string())?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => {
                // Whether anything can follow at all shows in the first mask.
                matcher.deep_clone().compute_mask_or_eos().map_err(|e| e.to_string())?;
                Ok(matcher)
            }
        }
    };
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("sluice-grammar".into()).stack_size(STACK_BYTES).spawn_scoped(scope, work);
        let thread = thread.map_err(|e| format!("no thread can be started: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the library crashed".to_owned()))
    })
}
